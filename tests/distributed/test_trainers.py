"""The callbacks of Lightning and of Hugging Face where several processes train."""

import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import parasparse as ps


def rigl(model, optimizer):
    assert isinstance(model, DistributedDataParallel)
    return ps.rigl(model, 0.8, optimizer, stop=100, every=2)


def check(controller):
    """Masks moved, and are the same on all processes: each has seen other samples."""
    assert len(controller.history) == 2
    assert controller.history[-1].churn > 0
    ps.distributed.check(controller.model)
    return [mask.clone() for _, mask in ps.named_masks(controller.model)]


def with_lightning(rank, folder):
    import lightning.pytorch as lightning

    from parasparse.integrations.lightning import Sparsity

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(rank)  # DDP gives all the first's weights
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    warnings.simplefilter("ignore")
    os.environ |= {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2"}
    x = torch.randn(40, 8)
    data = torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))
    callback = Sparsity(rigl)
    lightning.Trainer(
        callbacks=[callback], default_root_dir=folder, accelerator="cpu", devices=2,
        strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1,
    ).fit(Net(), torch.utils.data.DataLoader(data, batch_size=4))  # fmt: skip
    return check(callback.controller)


def with_transformers(rank, folder):
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

    from parasparse.integrations.transformers import SparsityCallback

    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(rank)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(40, (40, 8))]
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_strategy="no", ddp_backend="gloo",
        ddp_find_unused_parameters=True,
    )  # fmt: skip
    alone = Trainer(
        BertForMaskedLM(config), arguments, train_dataset=data, callbacks=[SparsityCallback(rigl)]
    )
    with pytest.raises(RuntimeError, match="trainer=trainer"):  # its masks would come apart
        alone.train()
    trainer = Trainer(BertForMaskedLM(config), arguments, train_dataset=data)
    callback = SparsityCallback(rigl, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    return check(callback.controller)


def test_lightning(run, tmp_path):
    one, two = run(2, with_lightning, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_transformers(run, tmp_path):
    one, two = run(2, with_transformers, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
