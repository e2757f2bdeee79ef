"""When two tensors are one."""

import torch

from parasparse.files.ties import first_names


def test_a_tie_is_the_same_memory_read_in_the_same_way():
    w, empty, meta = torch.randn(2, 2), torch.empty(0), torch.empty(2, 2, device="meta")
    tensors = {
        "w": w, "alias": w.detach(), "steps": 3, "bits": w.view(torch.int32), "flat": w.view(4),
        "t": w.t(), "row": w[0], "equal": w.clone(), "conj": w.cfloat().conj(),
        "empty": empty, "same": empty, "other empty": torch.empty(0),
        "meta": meta, "other meta": torch.empty(2, 2, device="meta"),
    }  # fmt: skip
    assert first_names(tensors) == {"alias": "w", "same": "empty"}


def test_a_conjugate_view_is_another_tensor():
    z = torch.randn(2, dtype=torch.complex64)
    assert first_names({"z": z, "conj": z.conj(), "again": z.conj()}) == {"again": "conj"}
