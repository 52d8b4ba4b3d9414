"""The Thinker is Qwen3 to the last digit, its cache changes nothing, and its generation does as it is told."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import ROOT, start
from torch import Tensor

from omni.models import layers, ops, thinker
from omni.models.architectures import ThinkerArchitecture
from omni.models.layers import KVCache, MoE, grouped_linear, load_balancing_loss
from omni.models.thinker import Thinker, qwen3_config, to_qwen3_state_dict

V = 300
SHAPES = {
    "mha-tied": dict(),
    "gqa-untied": dict(use_gqa=True, kv_groups=2, tie_embeddings=False),
    "mqa-head_dim": dict(use_gqa=True, kv_groups=1, head_dim=24, rope_theta=1e6),
    "moe": dict(use_moe=True, num_experts=5, moe_d_ff=52),
    "moe-top3-gqa": dict(use_moe=True, num_experts_per_tok=3, use_gqa=True, tie_embeddings=False),
}
SLOW = pytest.mark.skipif(not os.environ.get("OMNI_SLOW_TESTS"), reason="takes 40 s; set OMNI_SLOW_TESTS=1")
DENSE_AND_MOE = pytest.mark.parametrize("shape", ["gqa-untied", "moe"])


def build(shape: str = "mha-tied", seed: int = 0, **changes) -> Thinker:
    """A tiny model whose every weight matters: gains away from 1, matrices large enough to peak the softmaxes."""
    sizes = dict(vocab_size=V, ctx_len=48, n_layers=3, d_model=64, n_heads=4, d_ff=96) | SHAPES[shape] | changes
    torch.manual_seed(seed)
    model = Thinker(ThinkerArchitecture(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def foreign(model: Thinker, folder: Path):
    """The exported model, opened by transformers."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    folder.mkdir(exist_ok=True)
    weights = to_qwen3_state_dict(model.state_dict())
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(qwen3_config(model.architecture, V, 0)))
    other, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return other.eval()


# ---------------------------------------------------------------------------------------------------------------
# The same model as in transformers


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(shape, tmp_path):
    model, x = build(shape), tokens(2, 40)
    other = foreign(model, tmp_path)
    assert other.config.rms_norm_eps == 1e-6
    assert type(other).__name__ == ("Qwen3MoeForCausalLM" if "moe" in shape else "Qwen3ForCausalLM")
    torch.testing.assert_close(model(x), other(x).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ["moe", "moe-top3-gqa"])
@torch.no_grad()
def test_moe_losses_equal_transformers(shape, tmp_path):
    model, x = build(shape), tokens(2, 40)
    cross_entropy, aux = model.loss(x[:, :-1], x[:, 1:])
    other = foreign(model, tmp_path)
    torch.testing.assert_close(aux, other(x[:, :-1], output_router_logits=True).aux_loss, atol=1e-5, rtol=0)
    labels = F.pad(x[:, 1:-1], (1, 1), value=0)
    labels[:, 0], labels[:, 1:] = x[:, 0], x[:, 1:]
    torch.testing.assert_close(cross_entropy, other(x, labels=labels).loss, atol=1e-5, rtol=0)


@DENSE_AND_MOE
def test_greedy_generation_equals_transformers(shape, tmp_path):
    model, prompt = build(shape), tokens(7).tolist()
    other = foreign(model, tmp_path)
    other.generation_config.eos_token_id = None
    expected = other.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 7:]
    assert list(model.generate(prompt, max_new_tokens=30)) == expected.tolist()


# ---------------------------------------------------------------------------------------------------------------
# Attention and cache


@DENSE_AND_MOE
@torch.no_grad()
def test_a_token_changes_only_what_follows(shape):
    model, x = build(shape), tokens(2, 24)
    edited = x.clone()
    edited[:, 10] = (edited[:, 10] + 1) % V
    before, after = model(x), model(edited)
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-6, rtol=0)
    assert ((before[:, 10:] - after[:, 10:]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 1, 4, 1, 7, 5], [2, 22], [23, 1]])
@pytest.mark.parametrize("use_flash", [True, False])
@DENSE_AND_MOE
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(shape, use_flash, chunks):
    model, x = build(shape), tokens(3, 24)
    expected = model(x)
    for block in model.layers:
        block.self_attn.use_flash = use_flash
    cache = KVCache(model.architecture, 3, 24, "cpu", torch.float32)
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)  # unwritten places must not be read
    parts = [model(part, cache=cache) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)
    assert cache.position == 24
    with pytest.raises(ValueError, match="24 tokens"):
        model(x[:, :1], cache=cache)


@torch.no_grad()
def test_use_flash_false_selects_the_plain_maths(monkeypatch):
    arch, x, chosen = build().architecture, tokens(2, 20), []
    real = ops._PlainAttention.apply
    monkeypatch.setattr(ops._PlainAttention, "apply", lambda *keys: chosen.append("plain") or real(*keys))
    flash, plain = Thinker(arch).eval(), Thinker(arch, use_flash=False).eval()
    plain.load_state_dict(flash.state_dict())
    expected = flash(x)
    assert chosen == []
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=0)
    assert chosen == ["plain"] * arch.n_layers


@torch.no_grad()
def test_embeddings_in_and_hidden_states_out():
    model, x = build("gqa-untied"), tokens(2, 12)
    logits, hidden = model(inputs_embeds=model.embed_tokens(x), return_hidden=True)
    assert torch.equal(logits, model(x))
    assert torch.equal(hidden, model.hidden_states(x)) and torch.equal(model.head(hidden), logits)
    with pytest.raises(ValueError, match="either"):
        model()
    with pytest.raises(ValueError, match="ctx_len 48"):
        model(tokens(1, 49))


def test_state_dict_holds_parameters_only():
    model = build("gqa-untied")
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert model.rope_cos.dtype == torch.float32 and model.rope_cos.shape == (48, 16)
    assert "lm_head.weight" not in build("mha-tied").state_dict()


# ---------------------------------------------------------------------------------------------------------------
# Experts


def one_token_at_a_time(moe: MoE, x: Tensor) -> Tensor:
    """The mixture as its definition reads."""
    outputs = []
    for token in x.reshape(-1, x.shape[-1]):
        probabilities = (moe.gate.weight @ token).softmax(dim=0)
        best = probabilities.sort(descending=True).indices[: moe.top_k]
        y = torch.zeros_like(token)
        for expert in best:
            gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
            share = probabilities[expert] / probabilities[best].sum()
            y = y + share * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
        outputs.append(y)
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("shape", ["moe", "moe-top3-gqa"])
def test_grouped_experts_equal_one_token_at_a_time(shape):
    moe = build(shape).layers[0].mlp
    moe.gate.weight.data[0] = 0.0
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)) + 1.0
    moe.gate.weight.data[2] = -1.0  # expert 2 gets no token
    results = []
    for run in (lambda x: moe(x)[0], lambda x: one_token_at_a_time(moe, x)):
        x = x.detach().requires_grad_()
        y = run(x)
        results.append((y, *torch.autograd.grad((y * y).sum(), [x, *moe.parameters()])))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, atol=1e-4, rtol=1e-4)
    stats = moe(x)[1]
    assert stats[0, 2] == 0 and stats.sum(dim=1).tolist() == pytest.approx([moe.top_k, 1.0])


@pytest.mark.parametrize("ends", [[6, 6, 13, 16], [0, 0, 0, 16], [1, 2, 3, 16]])
def test_fused_and_looped_experts_agree(ends, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(*size, generator=generator).bfloat16() for size in ((16, 32), (4, 24, 32)))
    results = []
    for fused in (True, False):
        rows.requires_grad_(), weight.requires_grad_()
        if not fused:
            monkeypatch.setattr(F, "grouped_mm", None)
            monkeypatch.setattr(layers, "grouped_linear", layers._grouped_linear_loop)
        y = layers.grouped_linear(rows, weight, torch.tensor(ends, dtype=torch.int32))
        results.append((y, *torch.autograd.grad((y * y).sum(), [rows, weight])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.5, rtol=0.02)
    naive = torch.cat([rows[a:b] @ weight[e].T for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True))])
    torch.testing.assert_close(results[0][0], naive, atol=0.05, rtol=0.02)


def test_expert_sizes_that_the_fused_kernel_refuses():
    rows, weight = torch.randn(6, 13).bfloat16(), torch.randn(2, 11, 13).bfloat16()
    out = grouped_linear(rows, weight, torch.tensor([2, 6], dtype=torch.int32))
    torch.testing.assert_close(out, torch.cat((rows[:2] @ weight[0].T, rows[2:] @ weight[1].T)), atol=0.1, rtol=0.02)


def test_load_balancing_loss_is_top_k_when_even_and_more_when_not():
    even = torch.stack((torch.full((4,), 0.5), torch.full((4,), 0.25)))
    one_takes_all = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0]])
    assert load_balancing_loss([even, even]).item() == pytest.approx(2.0)
    assert load_balancing_loss([one_takes_all]).item() == pytest.approx(4.0)


# ---------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("shape", ["mha-tied", "moe"])
def test_overfits_one_batch(shape):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, ctx_len=32, n_layers=2, d_model=48, n_heads=4, d_ff=96) | SHAPES[shape]
    model = Thinker(ThinkerArchitecture(**sizes)).train()
    x = tokens(2, 17)
    first = model.loss(x[:, :-1], x[:, 1:])[0].item()
    assert abs(first - torch.tensor(float(V)).log().item()) < 0.2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        cross_entropy, aux = model.loss(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        (cross_entropy + 0.01 * aux).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert cross_entropy.item() < 0.05


def test_loss_counts_only_real_targets():
    model, x = build(), tokens(2, 20)
    targets = x[:, 1:].clone()
    targets[0, 3:11] = -100
    x = x[:, :-1]
    logits = model(x)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    mean, aux = model.loss(x, targets)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(model.loss(x, targets, "sum")[0], expected * 30, rtol=1e-5, atol=1e-4)
    assert aux.item() == 0 and mean.dtype == torch.float32
    assert model.loss(x, torch.full_like(targets, -100))[0].item() == 0
    with pytest.raises(ValueError, match="reduction"):
        model.loss(x, targets, "none")


def test_loss_weighs_its_targets():
    model, x = build(), tokens(2, 20)
    x, targets, weights = x[:, :-1], x[:, 1:].clone(), torch.rand(2, 19)
    targets[1, 5:] = -100
    nats = F.cross_entropy(model(x).mT, targets, ignore_index=-100, reduction="none")
    counted = weights * (targets != -100)
    torch.testing.assert_close(model(x, targets=targets, weights=weights)[0], (nats * counted).sum() / counted.sum())
    torch.testing.assert_close(
        model(x, targets=targets, weights=weights, reduction="sum")[0], (nats * counted).sum(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("experts", [False, True])
def test_logits_and_the_last_mlp_are_of_the_targets_only(experts):
    """Experts are balanced over all positions, so the last ones see all."""
    sizes = {"vocab_size": 300, "ctx_len": 64, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64}
    model = Thinker(ThinkerArchitecture(**sizes, use_moe=experts))
    x, targets, rows = torch.randint(0, 97, (4, 64)), torch.full((4, 64), -100), []
    targets[1, 60:], targets[3, :9] = 5, 7
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda module, given, out: rows.append(given[0].shape[:-1].numel()))
    model.norm.register_forward_hook(lambda module, given, out: rows.append(given[0].shape[:-1].numel()))
    model(x, targets=targets)
    assert rows == [4 * 64, 4 * 64 if experts else 64, 64]


def test_loss_in_chunks_is_the_same(monkeypatch):
    model, x, results = build("gqa-untied"), tokens(4, 21), []
    for chunk in (thinker.LOSS_CHUNK, 33):
        monkeypatch.setattr(thinker, "LOSS_CHUNK", chunk)
        loss = model.loss(x[:, :-1], x[:, 1:])[0]
        results.append((loss, *torch.autograd.grad(loss, model.parameters())))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_only():
    model, x = build(dropout=0.5), tokens(2, 20)
    assert torch.equal(model(x), build()(x))
    model.train()
    assert not torch.allclose(model(x), model(x), atol=1e-2)


def test_initial_scale():
    torch.manual_seed(0)
    model = Thinker(ThinkerArchitecture(vocab_size=V, n_layers=8, d_model=128, n_heads=4, d_ff=256))
    stds = {name.rsplit(".", 2)[-2]: parameter.std().item() for name, parameter in model.layers[0].named_parameters()}
    for name in ("q_proj", "v_proj", "gate_proj", "up_proj"):
        assert stds[name] == pytest.approx(0.02, rel=0.05)
    for name in ("o_proj", "down_proj"):
        assert stds[name] == pytest.approx(0.005, rel=0.05)


@DENSE_AND_MOE
def test_bf16_autocast_stays_close(shape):
    model, x = build(shape, moe_d_ff=56), tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        loss, _ = model.loss(x[:, :-1], x[:, 1:])
        generated = list(model.generate(x[0, :5].tolist(), max_new_tokens=4))
        cache = KVCache(model.architecture, 2, 20, "cpu", torch.bfloat16)
        cached = torch.cat([model(part, cache=cache) for part in x.split([7, 1, 12], dim=1)], dim=1)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32 and len(generated) == 4
    exact = model(x)
    assert F.cosine_similarity(logits.float().flatten(), exact.flatten(), dim=0) > 0.99
    assert F.cosine_similarity(cached.float().flatten(), exact.flatten(), dim=0) > 0.99
    assert loss.item() == pytest.approx(model.loss(x[:, :-1], x[:, 1:])[0].item(), rel=0.02)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@torch.no_grad()
def test_bf16_weights_stay_bf16():
    model, x = build("moe", moe_d_ff=56).bfloat16(), tokens(2, 20)
    logits, hidden = model(x, return_hidden=True)
    assert logits.dtype == hidden.dtype == torch.bfloat16
    assert len(list(model.generate([1, 2, 3], max_new_tokens=3))) == 3


@DENSE_AND_MOE
def test_the_training_graph_is_whole(shape):
    """fullgraph raises at a graph break; aot_eager needs no compiler."""
    from torch._dynamo.backends.debugging import aot_eager

    torch._dynamo.reset()
    graphs = []
    model, x = build(shape, n_layers=1), tokens(2, 21)
    expected = model.loss(x[:, :-1], x[:, 1:])
    # in place, as the runtime does it
    model.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))
    names = set(model.state_dict())
    loss, aux = model.loss(x[:, :-1], x[:, 1:])
    torch.testing.assert_close((loss, aux), expected)
    loss.backward()
    assert set(model.state_dict()) == names and not any("_orig_mod" in name for name in names)
    assert len(graphs) == 1


@SLOW
@DENSE_AND_MOE
def test_compiled_equals_eager(shape):
    torch._dynamo.reset()
    model, x = build(shape, n_layers=1), tokens(2, 21)
    loss = model.loss(x[:, :-1], x[:, 1:])[0]
    expected = [loss, *torch.autograd.grad(loss, model.parameters())]
    try:
        model.compile(fullgraph=True)
        loss = model.loss(x[:, :-1], x[:, 1:])[0]
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"no working compiler: {error}")
    for compiled, eager in zip([loss, *torch.autograd.grad(loss, model.parameters())], expected, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------
# Generation


def test_sampling_follows_its_seed_and_leaves_the_global_state():
    model, state = build(), torch.get_rng_state()

    def sample(**how) -> list[int]:
        return list(model.generate([5, 6, 7], max_new_tokens=20, **how))

    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    assert sample(temperature=1.0) != sample(temperature=1.0)
    greedy = sample()
    assert sample(temperature=1.0, top_k=1) == sample(temperature=1.0, top_p=1e-6) == greedy == sample(seed=3)
    assert sample(temperature=0.001, seed=1) == greedy
    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1, top_k=V, top_p=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = thinker._probabilities(logits, 2, None)
    torch.testing.assert_close(kept, torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    torch.testing.assert_close(thinker._probabilities(logits, None, 0.5), torch.tensor([0.0, 0.4, 0.0, 0.3]))
    torch.testing.assert_close(thinker._probabilities(logits, None, 0.39), torch.tensor([0.0, 0.4, 0.0, 0.0]))
    assert (thinker._probabilities(torch.zeros(9), 3, None) > 0).sum() == 3  # ties do not widen it


def test_generation_stops():
    model, prompt = build(), tokens(7).tolist()
    ids = list(model.generate(prompt, max_new_tokens=12))
    assert len(ids) == 12
    stop = next(i for i in ids[3:] if i not in ids[:3])
    assert list(model.generate(prompt, max_new_tokens=12, stop_ids=(V - 1, stop))) == ids[: ids.index(stop)]
    assert len(list(model.generate(prompt, max_new_tokens=1000))) == 48 - 7
    assert list(model.generate(tokens(48).tolist(), max_new_tokens=5)) == []
    for length in (0, 49):
        with pytest.raises(ValueError, match="prompt"):
            next(model.generate([1] * length, max_new_tokens=5))


def test_generation_leaves_the_caller_as_it_was():
    model = build(dropout=0.5).train()
    eager = list(build().generate([1, 2], max_new_tokens=5))
    stream = model.generate([1, 2], max_new_tokens=5)
    first = next(stream)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert not model.training and [first, *stream] == eager  # without dropout
    assert model.training
    stream = model.generate([1, 2], max_new_tokens=5)
    next(stream)
    stream.close()
    assert model.training
    model.loss(tokens(2, 9), tokens(2, 9))[0].backward()  # nothing became an inference tensor


def test_generation_reads_each_token_once():
    model, read = build(), []
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    list(model.generate([1] * 9, max_new_tokens=6))
    assert read == [9, 1, 1, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------
# infer_chat.py


@pytest.fixture(scope="module")
def stage_a(tmp_path_factory) -> Path:
    """A folder as train_text.py leaves it, of an untrained model."""
    from omni.data.tokenizer import Tokenizer
    from omni.stages.text import TextConfig
    from omni.train import checkpoint

    folder = tmp_path_factory.mktemp("stage a")
    tokenizer = Tokenizer.train(iter([f"the cat {i} sat on the mat and slept" for i in range(99)]), 340)
    tokenizer.save(folder / "tokenizer.json")
    config = TextConfig(
        save_dir=str(folder), train_text="corpus.txt", max_steps=1, vocab_size=tokenizer.vocab_size, ctx_len=64,
        n_layers=2, d_model=32, n_heads=4, d_ff=64,
    )  # fmt: skip
    torch.manual_seed(0)
    payload = {"stage": "text", "config": config.model_dump(), "step": 1, "metrics": {}}
    payload |= {"architecture": config.architecture.model_dump(), "model": Thinker(config.architecture).state_dict()}
    checkpoint.save(folder / "thinker.pt", payload | {"format": checkpoint.FORMAT_VERSION})
    return folder


def chat(monkeypatch, capsys, arguments: list[str], lines: list[str] = ()) -> tuple[str, str]:
    """Run infer_chat's main; what it wrote to stdout and stderr."""
    import infer_chat

    typed = "".join(f"{line}\n" for line in lines).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
    infer_chat.main(["--device", "cpu", *arguments])
    return capsys.readouterr()


def test_chat_prints_the_answer_only(stage_a, tmp_path):
    from omni.data.tokenizer import Tokenizer

    line = [ROOT / "infer_chat.py", "--ckpt_dir", stage_a, "--max_new_tokens", 9, "--device", "cpu"]
    done = start(*line, "--text", "the cat", cwd=tmp_path).wait()
    tokenizer = Tokenizer.load(stage_a / "tokenizer.json")
    model = Thinker(ThinkerArchitecture(vocab_size=tokenizer.vocab_size, ctx_len=64, n_layers=2, d_model=32,
                                        n_heads=4, d_ff=64))  # fmt: skip
    model.load_state_dict(torch.load(stage_a / "thinker.pt", weights_only=True)["model"])
    ids = model.generate(
        tokenizer.chat_prompt([{"role": "user", "content": "the cat"}]), max_new_tokens=9, stop_ids=(0, 4)
    )
    assert done.returncode == 0
    assert done.stdout == tokenizer.decode(list(ids), skip_special=True) + "\n"
    assert done.stderr == "the answer was cut by max_new_tokens 9\n"
    bad = start(*line, "--top_p", 1.5, cwd=tmp_path).wait()
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.count("\n") == 1 and "--top_p" in bad.stderr


@pytest.mark.parametrize(
    "flags",
    [["--temperature", "-1"], ["--temperature", "nan"], ["--top_k", "0"], ["--max_new_tokens", "0"], ["--top_p", "0"],
     ["--seed", "-1"], ["--seed", "x"], ["--pitch", "2"], ["--complete", "--system", "x"], ["--device", "tpu9"],
     ["--text", "cat " * 99], ["--complete", "--text", "cat " * 99]],
)  # fmt: skip
def test_chat_refuses_bad_flags_in_one_line(stage_a, flags, monkeypatch, capsys):
    from omni.common.errors import UserError

    with pytest.raises(UserError) as error:
        chat(monkeypatch, capsys, ["--ckpt_dir", str(stage_a), *flags])
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_chat_refuses_another_runs_tokenizer(stage_a, tmp_path, monkeypatch, capsys):
    from omni.common.errors import UserError
    from omni.data.tokenizer import Tokenizer

    (tmp_path / "thinker.pt").write_bytes((stage_a / "thinker.pt").read_bytes())
    for text, message in ((None, "tokenizer.json: cannot read"), ("abab", "not of one run")):
        if text is not None:
            Tokenizer.train(iter([text]), 300).save(tmp_path / "tokenizer.json")
        with pytest.raises(UserError, match=message):
            chat(monkeypatch, capsys, ["--ckpt_dir", str(tmp_path), "--text", "hi"])


def test_a_conversation_keeps_its_turns_until_the_context_is_full(stage_a, monkeypatch, capsys):
    from omni.chat.assistant import Assistant

    prompts, real = [], Assistant.answer

    def spy(assistant, ids, answer_states, *more, **sampling):
        prompts.append(assistant.tokenizer.decode(ids))
        yield from real(assistant, ids, answer_states, *more, **sampling)

    monkeypatch.setattr(Assistant, "answer", spy)
    flags = ["--ckpt_dir", str(stage_a), "--max_new_tokens", "6", "--system", "sys"]
    lines = ["the one", "", "the two", "/reset", "the three", "cat " * 99, *(f"mat {i:02}" for i in range(14))]
    out, err = chat(monkeypatch, capsys, flags, [*lines, "/quit", "not read"])
    assert prompts[0] == "<|system|>sys<|user|>the one<|assistant|>"
    assert prompts[1].startswith(prompts[0]) and prompts[1].endswith("<|end|><|user|>the two<|assistant|>")
    assert prompts[2] == "<|system|>sys<|user|>the three<|assistant|>"
    assert "context holds 64" in err and len(prompts) == 17
    assert all(prompt.startswith("<|system|>sys<|user|>") for prompt in prompts)
    assert prompts[3].startswith(prompts[2])  # what did not fit cost no earlier turn
    assert "cat cat" not in "".join(prompts) and "mat 00" not in prompts[-1] and "mat 12" in prompts[-1]
    assert "you>" not in out


def test_ctrl_c_stops_an_answer_and_not_the_program(stage_a, monkeypatch, capsys):
    from omni.chat.assistant import Assistant

    def interrupted(*_, **__):
        yield "half an "
        raise KeyboardInterrupt

    monkeypatch.setattr(Assistant, "answer", interrupted)
    out, _ = chat(monkeypatch, capsys, ["--ckpt_dir", str(stage_a)], ["one", "two"])
    assert out == "half an \nhalf an \n"
    with pytest.raises(KeyboardInterrupt):
        chat(monkeypatch, capsys, ["--ckpt_dir", str(stage_a), "--text", "one"])


def test_complete_continues_the_text_as_it_stands(stage_a, monkeypatch, capsys):
    from omni.chat.assistant import Assistant

    prompts = []
    monkeypatch.setattr(Assistant, "answer", lambda assistant, ids, *_, **__: prompts.append(ids) or iter(()))
    chat(monkeypatch, capsys, ["--ckpt_dir", str(stage_a), "--complete", "--text", "the cat"])
    assert prompts[0][0] == 0 and min(prompts[0][1:]) >= 16
