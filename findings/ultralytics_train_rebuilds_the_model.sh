#!/usr/bin/env bash
# ultralytics 8.4.190, torch 2.15.0, on a CPU: YOLO.train does not train the model that it is called
# on, but another one, which it builds from the configuration. Layers that were replaced in memory
# are back after it, and there is no error and no warning.
#
# `predict` uses the model in memory. A trainer whose `get_model` returns that model keeps it.
#
# Seen:
#   changed: ReLU
#   after predict: ReLU
#   after train: SiLU
#   after train with get_model: ReLU
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 \
    ultralytics==8.4.190 numpy==2.4.6
cat > program.py <<'PROGRAM'
from pathlib import Path

import cv2
import numpy as np
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

root = Path("data").resolve()
for part in ("train", "val"):
    (root / "images" / part).mkdir(parents=True)
    (root / "labels" / part).mkdir(parents=True)
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "images" / part / f"{number}.png"), image)
        (root / "labels" / part / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
(root / "data.yaml").write_text(
    f"path: {root}\ntrain: images/train\nval: images/val\nnames: [thing]\n"
)
options = dict(data=str(root / "data.yaml"), epochs=1, imgsz=64, batch=2, workers=0, amp=False,
               plots=False, val=False, verbose=False, device="cpu", project="runs")


def first(yolo):
    return type(yolo.model.model[0].act).__name__


def changed():
    yolo = YOLO("yolov8n.yaml")
    yolo.model.model[0].act = nn.ReLU()
    return yolo


yolo = changed()
print("changed:", first(yolo))
yolo.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)
print("after predict:", first(yolo))
yolo.train(**options)
print("after train:", first(yolo))

yolo = changed()
model = yolo.model


class Trainer(DetectionTrainer):
    def get_model(self, cfg=None, weights=None, verbose=True):
        return model


yolo.train(trainer=Trainer, **options)
print("after train with get_model:", first(yolo))
PROGRAM
export YOLO_CONFIG_DIR="$folder" YOLO_OFFLINE=true
shown=$(env/bin/python -W ignore program.py 2>/dev/null | grep -E "^(changed|after)")
printf '%s\n' "$shown"
wanted=$'changed: ReLU\nafter predict: ReLU\nafter train: SiLU\nafter train with get_model: ReLU'
[ "$shown" = "$wanted" ] || { echo "changed"; exit 1; }
echo "as described"
