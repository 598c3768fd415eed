"""The passes of ``retrieve``, a file each. They hand one another scratch files; ``job`` says which."""
