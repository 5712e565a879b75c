"""WeNet's experiments compute here what they compute in WeNet, and can be exported again.

tests/golden_wenet.pt holds four tiny experiments with random weights, and what WeNet (commit
01546996) computes from them.
"""

import dataclasses
import functools
import io
import json
import math
import os
import resource

from cli import UserError

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
import yaml

import decode
import transcribe
from conformer import ConvolutionModule, U2Conformer
from decode import MODES
from frames import sinusoids, valid_mask
from helpers import ROOT, TINY
from helpers_model import save_model, tiny_model
from model import load_checkpoint
from presets import ModelOptions
from tokenizer import from_vocab, load_tokenizer, train_char
from tools import wenet_import
from tools.wenet_import import from_wenet, load_wenet, main, to_wenet
from transforms import Frontend

GOLDEN = torch.load(ROOT / "tests" / "golden_wenet.pt", weights_only=True)
INPUTS = GOLDEN.pop("inputs")


def weights_of(golden):
    weights = {}
    start = 0
    for name, shape in golden["names"]:
        size = math.prod(shape)
        weights[name] = golden["weights"][start : start + size].float().view(shape)
        start += size
    return weights | {name: torch.tensor(count) for name, count in golden["counts"].items()}


@functools.cache
def file_of(name) -> bytes:
    """The final.pt of one of GOLDEN's experiments."""
    torch.save(weights_of(GOLDEN[name]), file := io.BytesIO())
    return file.getvalue()


def kaldi(stats):
    """Writes statistics of CMVN as Kaldi's text matrix."""
    rows = [*stats["mean_stat"], stats["frame_num"]], [*stats["var_stat"], 0]
    lines = ["  " + " ".join(map(repr, row)) for row in rows]
    return " [\n" + "\n".join(lines) + " ]\n"


def experiment(folder, name="abs_pos_conformer", weights=None, **config):
    """Writes one of GOLDEN's experiments as a directory.

    `config` replaces options of train.yaml; None removes one.
    """
    golden = GOLDEN[name]
    config = {key: value for key, value in (golden["config"] | config).items() if value is not None}
    folder.mkdir(exist_ok=True)
    (folder / "train.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    units = "".join(f"{token} {i}\n" for i, token in enumerate(golden["units"]))
    (folder / "units.txt").write_text(units)
    if weights is None:
        (folder / "final.pt").write_bytes(file_of(name))
    else:
        torch.save(weights, folder / "final.pt")
    if "cmvn" in golden:
        is_json = config.get("cmvn_conf", config)["is_json_cmvn"]
        written = json.dumps(golden["cmvn"]) if is_json else kaldi(golden["cmvn"])
        (folder / "global_cmvn").write_text(written)
    return str(folder)


def check_encoder(model, inputs, expected, lengths):
    """expected: {(chunk_size, left_chunks): the encoder's output}."""
    for (chunk_size, left_chunks), theirs in expected.items():
        ours, frames = model.encode(
            inputs["feats"], inputs["feat_lengths"], chunk_size, left_chunks
        )
        assert torch.equal(frames, lengths)
        valid = valid_mask(frames, ours.size(1))
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=0, atol=1e-4)


def check_streams(model, feats, expected):
    for (chunk_size, left_chunks), theirs in expected.items():
        ours, _ = model.stream(feats, model.stream_state(chunk_size, left_chunks), last=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.fixture
def batched_as_in_wenet(monkeypatch):
    """Hears batches as WeNet does, where the utterances of a batch influence one another.

    In WeNet the attention search runs to the frames of the longest utterance, and a convolution
    that is not causal sees glu(bias) in the padding.
    """
    search = decode.attention_beam_search
    depthwise = ConvolutionModule.depthwise

    def over_padding(self, x, few=False):
        if self.causal:
            return depthwise(self, x, few)
        padding = torch.nn.functional.glu(self.pointwise_conv1.bias, dim=0)
        return depthwise(self, torch.where((x == 0).all(-1, keepdim=True), padding, x))

    monkeypatch.setattr(ConvolutionModule, "depthwise", over_padding)
    monkeypatch.setattr(
        decode,
        "attention_beam_search",
        lambda step, size, max_length, *rest: search(step, size, int(max_length.max()), *rest),
    )


def check_decoding(model, inputs, expected, beam_size):
    for mode in MODES[:4]:  # WeNet has no mode joint
        ours = model.decode(inputs["feats"], inputs["feat_lengths"], mode, beam_size=beam_size)
        theirs = expected[mode]
        assert [hypothesis.tokens for hypothesis in ours] == [their["tokens"] for their in theirs]
        if mode in ("ctc_prefix_beam_search", "attention_rescoring"):  # WeNet scores no others
            assert [hypothesis.times for hypothesis in ours] == [their["times"] for their in theirs]
            assert [hypothesis.score for hypothesis in ours] == pytest.approx(
                [their["score"] for their in theirs], abs=1e-3
            )
        if mode == "ctc_prefix_beam_search":
            assert [hypothesis.nbest for hypothesis in ours] == [their["nbest"] for their in theirs]


def check_losses(model, inputs, expected):
    losses = model.loss(
        inputs["feats"], inputs["feat_lengths"], inputs["targets"], inputs["target_lengths"]
    )
    for name in ("loss", "loss_ctc", "loss_att"):
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=1e-4)


def sizes(expected):
    return {tuple(map(int, key.split())): value for key, value in expected.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_every_variant_computes_what_wenet_computes(tmp_path, batched_as_in_wenet, name):
    golden = GOLDEN[name]
    model, tokenizer, frontend = load_wenet(experiment(tmp_path / "exp", name))
    assert not model.training and frontend.frontend == "fbank" and frontend.num_mel_bins == 16
    assert tokenizer.vocab_size == 12 and tokenizer.blank_id == 0
    check_encoder(model, INPUTS, sizes(golden["encoder_out"]), golden["encoder_lengths"])
    check_streams(model, INPUTS["feats"][:1], sizes(golden["streams"]))
    out, lengths = model.encode(INPUTS["feats"], INPUTS["feat_lengths"])
    valid = valid_mask(lengths, out.size(1))
    torch.testing.assert_close(
        model.ctc_log_probs(out)[valid], golden["log_probs"][valid], rtol=0, atol=1e-4
    )
    check_losses(model, INPUTS, golden["losses"])
    check_decoding(model, INPUTS, json.loads(golden["decode"]), beam_size=4)


@pytest.mark.parametrize("name", [name for name in GOLDEN if "running" in GOLDEN[name]])
def test_batch_norm_trains_over_padding_as_in_wenet(tmp_path, name):
    golden = GOLDEN[name]
    model, _, _ = load_wenet(experiment(tmp_path / "exp", name))
    model.train()  # the experiments have no dropout
    check_losses(model, INPUTS, golden["train_losses"])
    theirs = to_wenet(model.net)
    for key, value in golden["running"].items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-4)


def test_the_larger_experiment_too(golden, batched_as_in_wenet):
    _, expected = golden
    model, _, _ = load_wenet(str(ROOT.parent / "shared" / "golden" / "u2pp_conformer"))
    outputs, streams = {(-1, -1): expected["encoder_out_full"]}, {}
    for key, value in expected.items():
        if "_chunk" in key:
            chunk_size, left_chunks = key.split("_chunk")[1].split("_left")
            (streams if key.startswith("stream") else outputs)[
                int(chunk_size), int(left_chunks)
            ] = value
    assert len(outputs) == 4 and len(streams) == 3
    check_encoder(model, expected, outputs, expected["encoder_lengths"])
    check_streams(model, expected["feats"][:1], streams)
    valid = valid_mask(expected["encoder_lengths"], 42)
    log_probs = model.ctc_log_probs(model.encode(expected["feats"], expected["feat_lengths"])[0])
    torch.testing.assert_close(
        log_probs[valid], expected["ctc_log_probs_full"][valid], rtol=0, atol=1e-4
    )
    check_losses(model, expected, expected)
    check_decoding(model, expected, json.loads(expected["decode"]), beam_size=5)


def test_a_right_to_left_decoder_that_is_not_trained_keeps_its_weights_and_gets_no_gradient(
    tmp_path,
):
    model, _, _ = load_wenet(experiment(tmp_path / "exp", "idle_right_decoder"))
    assert model.options.reverse_weight == 0 and model.net.right_decoder is not None
    losses = model.loss(
        INPUTS["feats"], INPUTS["feat_lengths"], INPUTS["targets"], INPUTS["target_lengths"]
    )
    losses["loss"].backward()
    for name, parameter in model.net.named_parameters():
        is_right = name.startswith("right_decoder")
        assert (parameter.grad is None) == is_right == (not parameter.requires_grad)


# The way back


def same_weights(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_out_and_in_again_is_the_same_to_the_bit(tmp_path, name, capsys):
    exp = experiment(tmp_path / "exp", name)
    ckpt = str(tmp_path / "a.ckpt")
    back = str(tmp_path / "back")
    main([exp, "--out", ckpt])
    main(["--export", ckpt, "--out", back])
    assert len(capsys.readouterr().out.splitlines()) == 2
    first, second = load_wenet(exp), load_wenet(back)
    assert same_weights(first[0].state_dict(), second[0].state_dict())
    assert same_weights(first[0].state_dict(), load_checkpoint(ckpt)[0].state_dict())
    assert first[0].options == second[0].options and first[2] == second[2]
    assert first[1].to_dict() == second[1].to_dict() == load_tokenizer(ckpt).to_dict()
    given = weights_of(GOLDEN[name])
    returned = torch.load(tmp_path / "back" / "final.pt", weights_only=True)
    assert all(torch.equal(returned[key], value) for key, value in given.items())
    assert all(key in given or key.endswith(".pe") for key in returned)


@pytest.mark.parametrize("vocabulary, config", [("AB", {"do_lower_case": True}), (["a", "ab"], {})])
def test_a_tokenizer_that_would_come_back_another_one_is_not_exported(tmp_path, vocabulary, config):
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *vocabulary]
    tokenizer = from_vocab({token: i for i, token in enumerate(tokens)}, {}, config)
    save_model(tiny_model(tokenizer, frontend=Frontend(frontend="fbank")), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="which WeNet does not have; train with one of characters"):
        main(["--export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "exp")])
    assert not (tmp_path / "exp").exists()


def test_exported_cmvn_reads_back_to_the_bit_from_its_file_too(tmp_path):
    model, _, _ = load_wenet(experiment(tmp_path / "exp"))
    main([experiment(tmp_path / "exp"), "--out", str(tmp_path / "a.ckpt")])
    main(["--export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "back")])
    weights = torch.load(tmp_path / "back" / "final.pt", weights_only=True)
    torch.save(
        {key: value for key, value in weights.items() if "cmvn" not in key},
        tmp_path / "back" / "final.pt",
    )
    assert same_weights(model.state_dict(), load_wenet(str(tmp_path / "back"))[0].state_dict())


def save(path, frontend, tokenizer, **options):
    narrow = dict(output_size=8, linear_units=8, cnn_module_kernel=8, decoder_linear_units=8)
    options = dataclasses.replace(TINY, **{**narrow, **options})
    model = tiny_model(tokenizer, options, frontend)
    save_model(model, path)
    return model


def test_a_model_of_our_own_goes_out_with_spaces_as_wenet_writes_them(tmp_path, capsys):
    frontend = Frontend(frontend="fbank", tail_padding=70)
    model = save(tmp_path / "a.ckpt", frontend, train_char(["ab c"]), reverse_weight=0.0)
    main(["--export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "exp")])
    assert "put 70 ms of zeros behind each recording" in capsys.readouterr().out
    assert (tmp_path / "exp" / "units.txt").read_text().splitlines()[4] == "\u2581 4"
    assert not (tmp_path / "exp" / "global_cmvn").exists()  # it had none
    again, tokenizer, _ = load_wenet(str(tmp_path / "exp"))
    assert same_weights(model.state_dict(), again.state_dict()) and again.net.right_decoder is None
    assert tokenizer.encode("ab c") == [5, 6, 4, 7] and tokenizer.decode([5, 6, 4, 7]) == "ab c"


def test_what_wenet_cannot_hold_is_not_exported(tmp_path):
    save(tmp_path / "a.ckpt", Frontend(), train_char(["ab c"]))
    with pytest.raises(UserError, match="a.ckpt: its features are log_mel"):
        main(["--export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "exp")])
    save(tmp_path / "c.ckpt", Frontend(frontend="fbank", high_freq=-400.0), train_char(["ab c"]))
    with pytest.raises(UserError, match="c.ckpt: its features are fbank with a high_freq"):
        main(["--export", str(tmp_path / "c.ckpt"), "--out", str(tmp_path / "exp")])
    save(
        tmp_path / "b.ckpt", Frontend(frontend="fbank"), train_char(["ab c"]), encoder="transformer"
    )
    with pytest.raises(UserError, match="rel_selfattn"):
        main(["--export", str(tmp_path / "b.ckpt"), "--out", str(tmp_path / "exp")])
    assert not (tmp_path / "exp").exists()


# Files


@pytest.mark.parametrize("is_json", [True, False])
def test_cmvn_comes_from_the_weights_or_from_a_file_in_either_format(tmp_path, is_json):
    conf = {"cmvn_file": "/nowhere/data/global_cmvn", "is_json_cmvn": is_json}
    weights = weights_of(GOLDEN["abs_pos_conformer"])
    held = load_wenet(experiment(tmp_path / "held", cmvn_conf=conf))[0].net.encoder
    assert torch.equal(held.cmvn_mean, weights["encoder.global_cmvn.mean"])
    without = {key: value for key, value in weights.items() if "cmvn" not in key}
    read = load_wenet(experiment(tmp_path / "read", weights=without, cmvn_conf=conf))[0].net.encoder
    stats = GOLDEN["abs_pos_conformer"]["cmvn"]
    mean = torch.tensor(stats["mean_stat"], dtype=torch.float64) / stats["frame_num"]
    squares = torch.tensor(stats["var_stat"], dtype=torch.float64) / stats["frame_num"]
    istd = (squares - mean**2).rsqrt()
    torch.testing.assert_close(read.cmvn_mean, mean.float())
    torch.testing.assert_close(read.cmvn_istd, istd.float())


def test_weights_under_a_key_and_position_tables_are_read(tmp_path):
    weights = weights_of(GOLDEN["transformer"])
    weights["encoder.embed.pos_enc.pe"] = weights["decoder.embed.1.pe"] = sinusoids(50, 12)[None]
    model, _, _ = load_wenet(
        experiment(tmp_path / "exp", "transformer", weights={"model": weights})
    )
    assert torch.equal(model.net.ctc.weight, weights["ctc.ctc_lo.weight"])
    weights["encoder.embed.pos_enc.pe"] = torch.randn(1, 50, 12)
    with pytest.raises(UserError, match="encoder.embed.pos_enc.pe does not hold the sines"):
        load_wenet(experiment(tmp_path / "exp", "transformer", weights=weights))


def test_the_vocabulary_keeps_its_ids_and_texts_get_real_spaces(tmp_path):
    # An old train.yaml, which names no tokenizer.
    _, tokenizer, _ = load_wenet(experiment(tmp_path / "exp", "batch_norm"))
    assert tokenizer.tokens == GOLDEN["batch_norm"]["units"]
    assert (tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id) == (1, 11, 11)
    assert tokenizer.encode(" ab c? ") == [3, 4, 2, 5, 1]
    assert tokenizer.decode([3, 4, 2, 5, 11]) == "ab c"
    _, tokenizer, _ = load_wenet(experiment(tmp_path / "new", "transformer"))
    assert (tokenizer.sos_id, tokenizer.eos_id) == (2, 3)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", None])
def test_sentencepiece_models_travel_in_the_checkpoint(tmp_path, kind):
    words = ["HELLO WORLD", "HELLO THERE", "LOW WORD"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=16,
        model_type="unigram",
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = [processor.id_to_piece(i) for i in range(3, 16)]
    units = ["<blank>", "<unk>", *pieces, "\u4f60", "<sos/eos>"]
    if kind == "sentencepiece":
        units = [processor.id_to_piece(i) for i in range(16)]
    folder = tmp_path / "exp"
    folder.mkdir()
    (folder / "units.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(units)))
    (tmp_path / "spm.model").rename(folder / "spm.model")
    model = save(
        tmp_path / "a.ckpt", Frontend(frontend="fbank", num_mel_bins=16), train_char(["x" * 3])
    )
    conf = {
        "bpe_path": "/nowhere/spm.model",
        "model_path": "/nowhere/spm.model",
        "symbol_table_path": "units.txt",
        "special_tokens": {"<sos>": 1, "<eos>": 2} if kind == "sentencepiece" else None,
    }
    main(["--export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "exported")])
    config = yaml.safe_load((tmp_path / "exported" / "train.yaml").read_text())
    config.update(
        output_dim=len(units), tokenizer=kind, tokenizer_conf=conf, ctc_conf={"ctc_blank_id": 0}
    )
    (folder / "train.yaml").write_text(
        yaml.safe_dump({k: v for k, v in config.items() if k != "tokenizer" or v})
    )
    net = U2Conformer(model.options, 16, len(units), 0, 0, 0)
    torch.save(
        {key: value for key, value in to_wenet(net).items() if "cmvn" not in key},
        folder / "final.pt",
    )
    main([str(folder), "--out", str(tmp_path / "b.ckpt")])
    tokenizer = load_checkpoint(str(tmp_path / "b.ckpt"))[1]
    text = "HELLO WORD"
    assert tokenizer.encode(text) == [
        units.index(piece) for piece in processor.encode(text, out_type=str)
    ]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if kind != "sentencepiece":
        assert tokenizer.encode("hello \u4f60") == [
            *tokenizer.encode("HELLO"),
            units.index("\u4f60"),
        ]
    main(["--export", str(tmp_path / "b.ckpt"), "--out", str(tmp_path / "back")])
    assert load_wenet(str(tmp_path / "back"))[1].to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_sentencepiece_model_that_is_none_is_refused(tmp_path, content):
    exp = experiment(tmp_path / "exp", tokenizer="bpe", tokenizer_conf={"bpe_path": "a/b.model"})
    with pytest.raises(UserError, match="no b.model in it, which train.yaml names as a/b.model"):
        load_wenet(exp)
    (tmp_path / "exp" / "b.model").write_bytes(content)
    with pytest.raises(UserError, match="the sentencepiece model"):
        load_wenet(exp)


def test_an_imported_checkpoint_transcribes(tmp_path, capsys):
    main([experiment(tmp_path / "exp"), "--out", str(tmp_path / "a.ckpt")])
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    transcribe.main(["--checkpoint", str(tmp_path / "a.ckpt"), str(tmp_path / "a.wav")])
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{tmp_path / 'a.wav'}\t")


# Refusals, each in one line


def changed(key, change):
    weights = weights_of(GOLDEN["abs_pos_conformer"])
    change(weights, key)
    return weights


KEY = "encoder.encoders.0.self_attn.linear_v.bias"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, k: w.pop(k), f"{KEY} is missing"),
        (lambda w, k: w.pop("encoder.global_cmvn.istd"), "encoder.global_cmvn.istd is missing"),
        (lambda w, k: w.update({k + "s": w[k]}), f"{KEY}s belongs to nothing"),
        (lambda w, k: w.update({k: w[k][1:]}), f"{KEY} has shape .11,., not train.yaml's .12,."),
        (lambda w, k: w.update({k: 1.0}), f"{KEY} is no tensor"),
        (lambda w, k: w.update({k: w[k] * torch.nan}), f"{KEY}.* is not finite"),
        (lambda w, k: w.clear(), "no weights by name"),
    ],
)
def test_every_weight_is_accounted_for(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_wenet(experiment(tmp_path / "exp", weights=changed(KEY, change)))


def test_weights_of_another_model_do_not_fit_quietly():
    """A key that both kinds of decoder have is not enough to load one as the other.

    from_wenet compares the weights with the whole network.
    """
    weights = weights_of(GOLDEN["transformer"])
    options = ModelOptions(
        output_size=12,
        attention_heads=2,
        linear_units=12,
        num_blocks=1,
        decoder_num_blocks=1,
        decoder_linear_units=12,
        encoder="transformer",
        selfattention_layer_type="selfattn",
    )
    with pytest.raises(UserError, match="decoder.left_decoder.*is missing"):
        from_wenet(weights, U2Conformer(options, 16, 12, 0, 2, 3))
    one_way = dataclasses.replace(options, reverse_weight=0.0)
    assert from_wenet(weights, U2Conformer(one_way, 16, 12, 0, 2, 3))


def conf(**change):
    return {"encoder_conf": {**GOLDEN["abs_pos_conformer"]["config"]["encoder_conf"], **change}}


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"encoder": "squeezeformer"},
            "encoder 'squeezeformer' is not supported, only conformer and transformer",
        ),
        ({"encoder": ["conformer"]}, "encoder .* is not supported"),
        ({"decoder": "sanm_decoder"}, "decoder 'sanm_decoder' is not supported"),
        ({"model": "paraformer"}, "model 'paraformer' is not supported"),
        ({"decoder": "transformer"}, "r_num_blocks is not supported"),
        ({"cmvn": "batch"}, "cmvn 'batch' is not supported"),
        (conf(input_layer="linear"), "input_layer 'linear' is not supported"),
        (conf(pos_enc_layer_type="rope_pos"), "pos_enc_layer_type 'rope_pos'"),
        (conf(cnn_module_norm="rms_norm"), "cnn_module_norm 'rms_norm'"),
        (conf(activation_type="gelu"), "activation_type 'gelu'"),
        (conf(normalize_before=False), "normalize_before False is not supported, only True"),
        (conf(macaron_style=False), "macaron_style False"),
        (conf(use_cnn_module=False), "use_cnn_module False"),
        (conf(efficient_conf={}), "encoder_conf: efficient_conf is not supported"),
        (conf(num_blocks="two"), "num_blocks is 'two'; it must be int"),
        (conf(causal=1), "causal is 1; it must be bool"),
        (conf(dropout_rate=7), "dropout_rate is 7, out of range"),
        (conf(attention_heads=5), "divisible by attention_heads"),
        (conf(causal=False, cnn_module_kernel=4), "odd --cnn_module_kernel"),
        (conf(use_dynamic_chunk=False, static_chunk_size=4), "static"),
        (conf(num_blocks=2), "encoder.encoders.1.*is missing"),
        ({"encoder_conf": "none"}, "encoder_conf must hold options"),
        (
            {"model_conf": {"reverse_weight": 0.3, "apply_non_blank_embedding": True}},
            "apply_non_blank_embedding True",
        ),
        ({"tokenizer": "whisper"}, "tokenizer 'whisper' is not supported"),
        ({"tokenizer_conf": {"split_with_space": True}}, "split_with_space"),
        (
            {"tokenizer_conf": {"symbol_table_path": "a/b.txt"}},
            "no b.txt in it, which train.yaml names as a/b.txt",
        ),
        (
            {"tokenizer_conf": {"special_tokens": {"<sos>": 12}}},
            "sos_id 12 is none of the 12 tokens",
        ),
        ({"tokenizer": "bpe"}, "put that one model into it"),
        ({"ctc_conf": {"ctc_blank_id": 3}}, "ctc_blank_id is 3, but <blank> is token 0"),
        ({"output_dim": 13}, "output_dim is 13, but there are 12 tokens"),
        ({"input_dim": 80}, "input_dim 80 is not the 16 num_mel_bins"),
        ({"dataset_conf": {"feats_type": "mfcc"}}, "feats_type 'mfcc' is not supported"),
        ({"tokenizer_conf": {"symbol_table_path": 5}}, "no 5 in it"),
        (
            {"cmvn": None, "cmvn_conf": {"is_json_cmvn": True}},
            "encoder.global_cmvn.mean belongs to nothing",
        ),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(tmp_path, monkeypatch, config, message):
    # The file of the weights is sound in each case, and reading it takes most of the time.
    weights = weights_of(GOLDEN["abs_pos_conformer"])
    monkeypatch.setattr(wenet_import, "read_weights", lambda _: weights)
    with pytest.raises(UserError, match=message) as caught:
        load_wenet(experiment(tmp_path / "exp", **config))
    assert str(caught.value).startswith(str(tmp_path / "exp"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("final.pt", None, "no final.pt"),
        ("final.pt", b"", "final.pt: damaged"),
        ("final.pt", b"PK junk", "final.pt: damaged"),
        ("train.yaml", None, "train.yaml: No such file"),
        ("train.yaml", b"a: [", "no YAML, or damaged"),
        ("train.yaml", b"\xff\xfe\x00", "no YAML, or damaged"),
        ("train.yaml", b"", "holds no options"),
        ("units.txt", None, "no units.txt"),
        ("units.txt", b"a\n", "a token and its id"),
        ("units.txt", b"a 0\nb 2\n", "without gaps"),
        ("units.txt", b"\xff 0\n", "a token and its id"),
        ("global_cmvn", b"{}", "global_cmvn: no global CMVN"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path, name, content, message):
    exp = experiment(tmp_path / "exp")
    (tmp_path / "exp" / name).unlink()
    if content is not None:
        (tmp_path / "exp" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_wenet(exp)


def test_an_experiment_directory_is_replaced_as_a_whole_and_only_where_export_made_it(tmp_path):
    """units.txt of one model beside final.pt of another would be imported, and hear nonsense."""
    for name, text in (("a", "ab c"), ("b", "xyz")):
        save(tmp_path / f"{name}.ckpt", Frontend(frontend="fbank"), train_char([text]))
    exp, command = tmp_path / "exp", ["--out", str(tmp_path / "exp"), "--overwrite", "--export"]
    main([*command, str(tmp_path / "a.ckpt")])
    before = {path.name: path.read_bytes() for path in exp.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # There is room for units.txt and not for final.pt.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot be written .*make room"):
            main([*command, str(tmp_path / "b.ckpt")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in exp.iterdir()} == before
    main([*command, str(tmp_path / "b.ckpt")])
    assert load_wenet(str(exp))[1].encode("xyz")
    assert (exp / "units.txt").read_bytes() != before["units.txt"]
    (exp / "epoch_0.pt").touch()
    with pytest.raises(UserError, match="epoch_0.pt"):
        main([*command, str(tmp_path / "a.ckpt")])
    os.symlink(exp / "final.pt", tmp_path / "link.ckpt")
    with pytest.raises(UserError, match="link.ckpt is a file of"):
        main([str(exp), "--out", str(tmp_path / "link.ckpt"), "--overwrite"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.ckpt",
        "b.ckpt",
        "exp",
        "link.ckpt",
    ]


def test_the_command_overwrites_only_when_told_and_needs_one_direction(tmp_path):
    exp, out = experiment(tmp_path / "exp"), tmp_path / "a.ckpt"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        main([exp, "--out", str(out)])
    assert out.read_text() == "mine"
    main([exp, "--out", str(out), "--overwrite"])
    with pytest.raises(UserError, match="exists"):
        main(["--export", str(out), "--out", exp])
    for words in ([], [exp, "--export", str(out)]):
        with pytest.raises(UserError, match="give EXP_DIR"):
            main([*words, "--out", str(tmp_path / "b.ckpt")])
    with pytest.raises(UserError, match="ends in .ckpt"):
        main([exp, "--out", str(tmp_path / "b.pt")])
    (tmp_path / "exp" / "link.pt").symlink_to("gone.pt")
    with pytest.raises(UserError, match="cannot be written"):
        main([exp, "--out", str(tmp_path / "none" / "b.ckpt")])
    with pytest.raises(UserError, match="nowhere: train.yaml: No such file"):
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "b.ckpt")])
