#!/usr/bin/env bash
# Installs each supported TRL in an environment of its own and runs the contract tests and the tests of the trainer
# against it. Arguments: the torch requirement, then the other pinned requirements without TRL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
torch=$1
read -r -a pinned <<< "$2"
for trl in 1.15.0 1.16.0; do
    environment=.venv-trl-$trl
    echo "== TRL $trl"
    if [ ! -f "$environment/.installed" ]; then
        python3 -m venv "$environment"
        "$environment/bin/python" -m pip install --quiet "$torch"
        "$environment/bin/python" -m pip install --quiet "trl==$trl" "${pinned[@]}" pytest bitsandbytes triton adamp==0.3.0 \
            matplotlib scikit-learn
        "$environment/bin/python" -m pip install --quiet --no-deps -e .
        touch "$environment/.installed"
    fi
    export OMP_NUM_THREADS=1
    "$environment/bin/python" -m pytest tests/contract tests/sparse_po/test_sparse_po_trainer.py
    # The policy's head of TRL 1.15 is a Triton kernel, which needs its interpreter on a CPU
    interpret=$([ "$trl" = 1.15.0 ] && echo 1 || echo 0)
    TRITON_INTERPRET=$interpret "$environment/bin/python" -m pytest \
        tests/constrained_ppo/test_constrained_ppo_trainer.py tests/optim/test_install.py tests/optim/test_trl_scripts.py \
        tests/equilibrium/test_training.py
done
