"""`prune_blocks` of a mixture of experts on disk, which has a tensor for each expert there."""

import copy
import inspect

import pytest
import torch
import transformers as tf
from accelerate import init_empty_weights

import parasparse as ps

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, on tiny configs
FUSES = "save_original_format" in inspect.signature(tf.PreTrainedModel.save_pretrained).parameters


@pytest.mark.skipif(not FUSES, reason="this version of transformers does not fuse experts")
def test_a_mixture_is_written_with_fused_experts_first(tmp_path):
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    dense = tf.MixtralForCausalLM(config)
    batches = torch.randint(40, (4, 12)).split(2)
    original, fused, offload, output = (tmp_path / name for name in "abcd")
    dense.save_pretrained(original)

    def prune(source):
        with init_empty_weights():
            empty = tf.MixtralForCausalLM(config)
        ps.prune_blocks(empty, batches, ps.OneShot(0.5), source=source, output=output)

    with pytest.raises(ValueError, match=r"experts.0.w1.*save_original_format=False"):
        prune(original)
    on_disk = tf.MixtralForCausalLM.from_pretrained(
        original, device_map={"": "disk"}, offload_folder=offload
    )
    on_disk.save_pretrained(fused, save_original_format=False)
    prune(fused)
    found = tf.MixtralForCausalLM.from_pretrained(output).state_dict()
    expected = ps.squash(ps.prune_blocks(copy.deepcopy(dense), batches, ps.OneShot(0.5)))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name
