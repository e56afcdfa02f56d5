#!/usr/bin/env bash
# A sweep over three hosts with TLS: docs/sweeps.md between network namespaces of this machine.
# As root, from the project's root: tests/faults/hosts.sh
set -euo pipefail
bin=$PWD/.venv/bin
work=$(mktemp -d)
names=(svdlib1 svdlib2 svdlib3)

clean() {
  for name in "${names[@]}"; do
    ip netns pids "$name" 2>/dev/null | xargs -r kill -9 || true
    ip netns del "$name" 2>/dev/null || true
  done
  ip link del svdlib0 2>/dev/null || true
  rm -rf "$work"
}
trap clean EXIT

ip link add svdlib0 type bridge
ip link set svdlib0 up
for i in 1 2 3; do
  ip netns add svdlib$i
  ip link add veth$i type veth peer name eth0 netns svdlib$i
  ip link set veth$i master svdlib0 up
  ip netns exec svdlib$i ip addr add 10.77.0.$i/24 dev eth0
  ip netns exec svdlib$i ip link set eth0 up
  ip netns exec svdlib$i ip link set lo up
done

cd "$work"
sed -n '/^distributed:/,/^```/p' "$OLDPWD/docs/sweeps.md" | grep -v '```' >svdlib-dask.yaml
eval "$(grep '^openssl' "$OLDPWD/docs/sweeps.md")" 2>/dev/null
export DASK_CONFIG=$work/svdlib-dask.yaml
on() { ip netns exec "svdlib$1" "${@:2}"; }

on 1 "$bin/dask" scheduler --protocol tls --host 10.77.0.1 --port 8786 --no-dashboard 2>scheduler.log &
for i in 2 3; do
  OMP_NUM_THREADS=1 on $i "$bin/dask" worker tls://10.77.0.1:8786 --nworkers 1 --nthreads 1 \
    --no-dashboard 2>worker$i.log &
done
sleep 5
mkdir notebooks
"$bin/python" - <<'P'
import nbformat
from nbformat.v4 import new_code_cell, new_notebook

parameters = new_code_cell("n: int = 1\nfigures: str = ''", metadata={"tags": ["parameters"]})
told = """
import subprocess
address = subprocess.run(["ip", "-4", "-o", "addr", "show", "eth0"], capture_output=True, text=True)
open(f"{figures}/table.csv", "w").write(f"host\\n{address.stdout.split()[3]}\\n")
"""
nbformat.write(new_notebook(cells=[parameters, new_code_cell(told)]), "notebooks/a.ipynb")
P
on 1 "$bin/python" -m svdlib run a --over n 0:8 --scheduler tls://10.77.0.1:8786
on 1 "$bin/python" -m svdlib collect a table | cut -d, -f1 | sort | uniq -c
echo "without certificates:"
! on 1 env -u DASK_CONFIG "$bin/python" -m svdlib run a --fresh --scheduler tcp://10.77.0.1:8786
