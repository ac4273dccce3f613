"""Adapters: there and back, and PEFT itself reads them to the same hidden states."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimamba.config import Task, preset
from omnimamba.model.adapter import load_adapter, save_adapter
from omnimamba.model.omnimamba import OmniMambaModel


@pytest.fixture
def make():
    def make(seed=0):
        torch.manual_seed(seed)
        model = OmniMambaModel(preset("tiny")).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return model

    return make


@pytest.mark.parametrize("task", Task)
def test_there_and_back(make, task, tmp_path):
    one, other = make(0), make(1)
    save_adapter(one, task, tmp_path / "adapter", base="nano")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert load_adapter(other, tmp_path / "adapter") is task
    for name, tensor in other.state_dict().items():
        expected = one.state_dict()[name] if "lora" in name and name.endswith(task) else before[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks transformers 5.24 for it
def test_peft_reads_it(make, tmp_path):
    """transformers' Mamba-2 with our backbone and the adapter gives our hidden states; what PEFT then saves is read back."""
    peft = pytest.importorskip("peft")
    from transformers import Mamba2Config, Mamba2ForCausalLM

    ours = make()
    save_adapter(ours, Task.MMU, tmp_path / "adapter", base="base")
    config, sizes = ours.config, ours.config.backbone
    base = Mamba2ForCausalLM(
        Mamba2Config(
            num_heads=sizes.nheads,
            head_dim=sizes.headdim,
            hidden_size=sizes.d_model,
            state_size=sizes.d_state,
            num_hidden_layers=sizes.n_layer,
            layer_norm_epsilon=sizes.norm_eps,
            expand=sizes.expand,
            conv_kernel=sizes.d_conv,
            n_groups=sizes.ngroups,
            chunk_size=sizes.chunk_size,
            vocab_size=config.text_vocab_size,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
    )
    weights = {name: tensor for name, tensor in ours.state_dict().items() if name.startswith("backbone.") and ".lora_" not in name}
    missing = base.load_state_dict(weights | {"backbone.embeddings.weight": ours.text_embedding.weight}, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    base.tie_weights()
    x = torch.randn(2, 21, sizes.d_model)
    plain = base.eval()(inputs_embeds=x).logits
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(inputs_embeds=x).logits, ours.logits(ours(x, Task.MMU), Task.MMU), rtol=1e-4, atol=1e-4)
        assert (adapted(inputs_embeds=x).logits - plain).abs().max() > 0.01

    adapted.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    other = make(1)
    with pytest.raises(ValueError, match="does not say its task; pass task, one of mmu, t2i"):
        load_adapter(other, tmp_path / "again")
    assert load_adapter(other, tmp_path / "again", Task.T2I) is Task.T2I
    state = ours.state_dict()
    for name, tensor in other.state_dict().items():
        if name.endswith(".t2i") and "lora" in name:
            assert torch.equal(tensor, state[name.replace(".t2i", ".mmu")])


def test_another_alpha(make, tmp_path):
    one, other = make(0), make(0)
    save_adapter(one, Task.MMU, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    load_adapter(other, tmp_path)
    x = torch.randn(1, 5, 64)
    plain, twice = (model.backbone.layers[0].mixer.in_proj.lora(x, Task.MMU) for model in (one, other))
    torch.testing.assert_close(twice, 2 * plain)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config, tensors: config.update(r=4), "rank 4, but the model's task LoRA has rank 8"),
        (lambda config, tensors: config.update(peft_type="IA3"), "not plain LoRA"),
        (lambda config, tensors: config.update(alpha_pattern={"layers.0": 64}), "not plain LoRA"),
        (lambda config, tensors: config.pop("lora_alpha"), "adapter_config.json: no number lora_alpha"),
        (lambda config, tensors: tensors.popitem(), "1 tensors are missing or have no place in the model, e.g. base_model"),
        (lambda config, tensors: tensors.update(dict.fromkeys(tensors, torch.zeros(2, 2))), r"has shape \[2, 2\], the model needs"),
    ],
)
def test_what_does_not_fit(make, tmp_path, spoil, message):
    save_adapter(make(), Task.MMU, tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    spoil(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors", {"task": "mmu"})
    with pytest.raises(ValueError, match=message):
        load_adapter(make(), tmp_path)


def test_wrong_task_and_no_adapter(make, tmp_path):
    save_adapter(make(), Task.MMU, tmp_path)
    with pytest.raises(ValueError, match="an adapter of the task mmu, not of t2i"):
        load_adapter(make(), tmp_path, Task.T2I)
    with pytest.raises(ValueError, match="has no adapter_config.json, so it is no adapter in PEFT's format"):
        load_adapter(make(), tmp_path / "none")
