"""A training run that is killed half-way resumes to bit-equal weights and trajectory."""

import subprocess
import sys

import torch

SCRIPT = """
import os, sys
import torch
from torch import nn
from qmf_fusion import FusionModel, QMFLoss

path, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
x = {"a": torch.randn(24, 5), "b": torch.randn(24, 3)}
y = torch.randint(0, 4, (24,))
model = FusionModel({"a": nn.Linear(5, 4), "b": nn.Linear(3, 4)}, learnable=True)
criterion = QMFLoss(model.fusion, num_samples=24, start_epoch=2)
optimizer = torch.optim.Adam(model.parameter_groups(lr=0.05))
parts = {"model": model, "criterion": criterion, "optimizer": optimizer}
first = 0
if os.path.exists(path):
    state = torch.load(path)
    first = state["step"]
    for name, part in parts.items():
        part.load_state_dict(state[name])
for step in range(first, steps):
    batch = torch.randperm(24, generator=torch.Generator().manual_seed(step // 3)).chunk(3)[step % 3]
    out = model({name: rows[batch] for name, rows in x.items()})
    optimizer.zero_grad()
    criterion(out.unimodal_logits, y[batch], batch).loss.backward()
    optimizer.step()
    state = {"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}
    torch.save(state, path + ".new")
    os.replace(path + ".new", path)
    print(step + 1, flush=True)
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole, broken = str(tmp_path / "whole.pt"), str(tmp_path / "broken.pt")
    subprocess.run([sys.executable, "-c", SCRIPT, whole, "30"], check=True, capture_output=True)
    # Told to go on for ever: only the signal ends it.
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, broken, "1000000000"], stdout=subprocess.PIPE, text=True
    ) as run:
        for line in run.stdout:
            if int(line) >= 11:
                run.kill()
                break
    assert run.returncode == -9
    assert torch.load(broken)["step"] >= 11
    last = max(30, torch.load(broken)["step"] + 5)
    if last != 30:  # it ran on for a while before the signal reached it
        subprocess.run([sys.executable, "-c", SCRIPT, whole, str(last)], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", SCRIPT, broken, str(last)], check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[0]) > 11  # it went on, rather than start again
    expected, resumed = torch.load(whole), torch.load(broken)
    for part in ("model", "criterion"):
        assert expected[part].keys() == resumed[part].keys()
        for name, x in expected[part].items():
            assert torch.equal(x, resumed[part][name]), name
    assert expected["criterion"]["ranking.trajectory.history"][1].sum() > 0
