#!/bin/sh
# One step of the image: installs torch, the rest, or the program into /opt/dab/venv. Run by docker/Dockerfile.
set -eu

pip() {
    UV_NO_CACHE=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 /opt/uv/bin/uv pip "$@" --python /opt/dab/venv/bin/python
}

case $1 in
torch)
    /opt/uv/bin/uv venv --quiet --python "$(command -v python3)" /opt/dab/venv
    if [ -z "$2" ]; then # as locked, with the CUDA libraries of its build
        grep -E '^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' /mnt/requirements.lock >/tmp/torch.txt
        pip install --no-deps --requirements /tmp/torch.txt
    else # the same torch, built for something else, with the libraries that this build names
        grep -E '^(torch|torchvision)==' /mnt/requirements.lock >/tmp/torch.txt
        grep -vE '^(nvidia-|cuda-)' /mnt/requirements.lock >/tmp/others.txt
        pip install --torch-backend "$2" --requirements /tmp/torch.txt --constraints /tmp/others.txt
    fi
    ;;
rest)
    # What the program needs, and the MLflow server's drivers; nothing for developers. Torch is there: it is not resolved.
    grep -vE '^(torch==|torchvision==|nvidia-|cuda-)' /mnt/requirements.lock >/tmp/others.txt
    version=$(/opt/dab/venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')
    echo "torch==$version" >>/tmp/others.txt
    pip install --requirements /mnt/pyproject.toml --requirements /mnt/server.lock --constraints /tmp/others.txt
    ;;
program)
    pip install --no-deps --no-build-isolation --editable /opt/dab/src
    /opt/dab/venv/bin/python -m compileall -q /opt/dab/src
    ;;
esac
rm -f /tmp/torch.txt /tmp/others.txt
