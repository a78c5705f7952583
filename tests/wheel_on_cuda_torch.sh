#!/usr/bin/env bash
# A wheel with CUDA kernels, built here (no GPU needed), must load into the CUDA build of torch under
# another Python and register its CUDA kernels there. Downloads about 3 GB, takes about 7 GB of disk.
#
#   tests/wheel_on_cuda_torch.sh SCRATCH      a folder for the virtual environment, kept between runs
#
#   PYTHON=...      builds the wheel; default .venv/bin/python, else python3
#   PYTHON312=...   the other Python; default python3.12
#   TORCH=...       default torch==2.11.0
#   MEDCL_CUDA_ARCHS, MEDCL_BUILD_DIR, MAX_JOBS as for every build
set -euo pipefail
[[ $# -eq 1 ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
scratch=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
if [[ -z ${PYTHON:-} ]]; then PYTHON=$([[ -x .venv/bin/python ]] && echo "$PWD/.venv/bin/python" || echo python3); fi
other=$scratch/venv/bin/python

echo "== wheel with CUDA kernels, built by $("$PYTHON" --version)"
rm -rf "$scratch/dist"
MEDCL_CUDA=1 MEDCL_CUDA_ARCHS=${MEDCL_CUDA_ARCHS:-80;90a;90+PTX} MEDCL_BUILD_DIR=${MEDCL_BUILD_DIR:-$scratch/build} \
  "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w "$scratch/dist" .
wheel=$(echo "$scratch"/dist/medcl_kernels-*-py3-none-*.whl)
[[ -f $wheel ]] || { echo "FAIL: no py3-none wheel in $scratch/dist" >&2; exit 1; }
echo "PASS: $(basename "$wheel"), $(du -k "$wheel" | cut -f1) KB"

echo "== ${TORCH:=torch==2.11.0} for CUDA"
[[ -x $other ]] || "${PYTHON312:-python3.12}" -m venv "$scratch/venv"
"$other" -m pip install -q --no-cache-dir "$TORCH" numpy
"$other" -m pip install -q --no-index --no-deps --force-reinstall "$wheel"

# outside of the checkout, or its own package would be imported
cp tests/wheel_on_cuda_torch.py "$scratch/check.py"
cd "$scratch"
exec env -u PYTHONPATH "$other" check.py
