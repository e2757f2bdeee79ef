#!/usr/bin/env bash
# lightning 2.6.6, torch 2.15.0, on a CPU: ModelPruning with use_lottery_ticket_hypothesis=True, its
# default, rewinds weights to their initial values only once. Later rewinds leave them as trained.
#
# The first rewind assigns the data of the saved copy to the weight (dst.data = src.data.to(device)).
# On one device this copies nothing: weight and copy share their memory, and training changes both.
# Iterative pruning with rewinding is then pruning without it after the first round. A GPU was not
# tried.
#
# Seen (the largest change of a weight since the start, before and after the rewind):
#   epoch 0: 0.0734 before, 0.0000 after, rewound
#   epoch 1: 0.0747 before, 0.0747 after, not rewound
#   epoch 2: 0.1302 before, 0.1302 after, not rewound
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 lightning==2.6.6 numpy==2.4.6
cat > program.py <<'PROGRAM'
import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import ModelPruning


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8, bias=False)

    def training_step(self, x, index):
        return self.layer(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Pruning(ModelPruning):
    def on_train_epoch_end(self, trainer, net):
        before = change(net.layer)
        super().on_train_epoch_end(trainer, net)  # prunes and rewinds
        after = change(net.layer)
        rewound = "not rewound" if after else "rewound"
        print(f"epoch {trainer.current_epoch}: {before:.4f} before, {after:.4f} after, {rewound}")


def change(layer):
    return float((getattr(layer, "weight_orig", layer.weight) - first).abs().max())


torch.manual_seed(0)
net = Net()
first = net.layer.weight.detach().clone()
pruning = Pruning("l1_unstructured", parameters_to_prune=[(net.layer, "weight")], amount=0.2)
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = lightning.Trainer(accelerator="cpu", max_epochs=3, callbacks=[pruning], **options)
trainer.fit(net, torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=8))
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null | grep '^epoch')
printf '%s\n' "$shown"
case "$shown" in *"after, rewound"*"not rewound"*"not rewound") ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
