# docker build -f docker/gpu.Dockerfile -t openlvd:gpu .
# PyTorch's wheel and faiss-gpu bring their own CUDA libraries; the host needs the driver and its container toolkit.
FROM python:3.11-slim
WORKDIR /openlvd
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY curation curation
COPY embedding embedding
COPY training training
COPY pipelines pipelines
RUN pip install --no-cache-dir -c constraints.txt ".[gpu,hf,webdataset]"
RUN useradd --create-home openlvd
USER openlvd
WORKDIR /data
ENTRYPOINT ["openlvd"]
