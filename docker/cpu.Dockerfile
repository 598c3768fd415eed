# docker build -f docker/cpu.Dockerfile -t openlvd:cpu .
FROM python:3.11-slim
WORKDIR /openlvd
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY curation curation
COPY embedding embedding
COPY training training
COPY pipelines pipelines
# The CPU build of PyTorch: the default index serves the CUDA build for Linux.
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu" \
 && pip install --no-cache-dir -c constraints.txt ".[cpu,hf,webdataset]"
RUN useradd --create-home openlvd
USER openlvd
WORKDIR /data
ENTRYPOINT ["openlvd"]
