#!/usr/bin/env bash
# Installs each supported set of versions in an environment of its own and runs tests against it.
# Arguments: "contract" for the contract tests and those of the trainers, or "quick" for the fast tier of the suite; the
# torch requirement; then the requirements that everything was built on. SETS names some of the sets, INTERPRETER another
# Python than python3, such as python3.13.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tier=$1 torch=$2
read -r -a usual <<< "$3"
export OMP_NUM_THREADS=1
failed=()

declare -A sets=(
    [lowest]="trl==1.15.0 transformers==5.5.0 accelerate==1.10.0 peft==0.18.0 datasets==4.7.0 deepspeed==0.19.3"
    [usual]="${usual[*]}"
    [newest]="trl transformers accelerate peft datasets deepspeed"
)

for name in ${SETS:-lowest usual newest}; do
    environment=.venv-$name${INTERPRETER:+-$(basename "$INTERPRETER")}
    python=$environment/bin/python
    if [ ! -f "$environment/.installed" ]; then
        "${INTERPRETER:-python3}" -m venv "$environment"
        "$python" -m pip install --quiet "$torch"
        read -r -a requirements <<< "${sets[$name]}"
        "$python" -m pip install --quiet "${requirements[@]}" -e ".[dev]"
        touch "$environment/.installed"
    fi
    echo "== $name: $("$python" -m pip list --format freeze | grep -E '^(torch|trl|transformers|accelerate|peft|datasets|deepspeed)==' | tr '\n' ' ')"
    # The policy's head of TRL 1.15 is a Triton kernel, which needs its interpreter on a CPU
    interpret=$([ "$name" = lowest ] && echo 1 || echo 0)
    if [ "$tier" = quick ]; then
        TRITON_INTERPRET=$interpret "$python" -m pytest -n 2 --dist worksteal -m "not slow and not distributed" || failed+=("$name")
        continue
    fi
    "$python" -m pytest tests/contract tests/sparse_po/test_sparse_po_trainer.py || failed+=("$name")
    TRITON_INTERPRET=$interpret "$python" -m pytest \
        tests/constrained_ppo/test_constrained_ppo_trainer.py tests/optim/test_install.py tests/optim/test_trl_scripts.py \
        tests/equilibrium/test_training.py || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
