# protformer with CUDA for GPU clusters.
#
#   docker build -t protformer .
#   docker run --rm --gpus all --ipc=host -v "$PWD/data:/data:ro" -v "$PWD/runs:/runs" --user "$(id -u):$(id -g)" \
#       protformer train --fasta /data/proteins.fasta --out /runs/first
#
# The base: torch's own wheel brings cuBLAS, cuDNN and NCCL, so NVIDIA's `base` flavour (the CUDA runtime library, the
# settings that ask for the GPU, forward compatibility with older data-centre drivers) is all that is missing; the
# `runtime` flavour would store those libraries a second time. Its CUDA version, 13.0, is that of the torch wheel which
# pyproject.toml admits: raise both together.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Ubuntu keeps one version of a package in its archive, so pinning it would only break later builds.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Dependencies first: this layer of some GB is built again only when pyproject.toml changes, not with each edit.
WORKDIR /src
COPY pyproject.toml ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = project["optional-dependencies"]; \
print(*project["dependencies"], *extras["zstd"], *extras["parquet"], sep="\n")' > /tmp/requirements.txt \
    && pip install -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# The README's line for a clone without the -e, and with all that a reader or writer of files can need.
COPY . .
# hadolint ignore=DL3013
RUN pip install ".[zstd,parquet]"

# Ubuntu's image has a user `ubuntu` at 1000. Home and runs are open to every user, since clusters start containers
# under the user's own number, which has no entry in /etc/passwd (hence USER, which getpass asks for).
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --create-home protformer \
    && mkdir /data /runs \
    && chown protformer:protformer /data /runs \
    && chmod 1777 /home/protformer /runs
ENV HOME=/home/protformer \
    USER=protformer \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONUNBUFFERED=1
USER 1000
WORKDIR /runs
VOLUME ["/data", "/runs"]

ENTRYPOINT ["protformer"]
CMD ["--help"]
