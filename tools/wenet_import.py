"""Imports models of WeNet and exports ours to WeNet: the same weights under other names.

  python -m tools.wenet_import EXP_DIR --out MODEL.ckpt            imports an experiment of WeNet
  python -m tools.wenet_import --export MODEL.ckpt --out EXP_DIR   is the way back

MODEL.ckpt is a checkpoint like those of train.py. EXP_DIR holds final.pt, train.yaml, units.txt
and, where train.yaml names them, global_cmvn and a sentencepiece model. The files are looked for in
EXP_DIR first, whatever folder train.yaml names for them. An option with which we would not compute
exactly what WeNet computes is refused by name. WeNet has separate dropouts for positions and
decoders; here the encoder's two dropouts serve for all.
"""

import base64
import dataclasses
import glob
import io
import json
import os
import re

from cli import UserError, make_parser, run, shown

import torch
import yaml

from checkpoint import not_finite, read_weights_only
from conformer import U2Conformer
from files import identity, parse_yaml, published, read_small, read_text, why, write_whole
from frames import sinusoids
from model import U2, OptimOptions, load_checkpoint, skeleton
from presets import ModelOptions
from tokenizer import BPE_SPACE, Tokenizer, brief, unit_lines
from transforms import Frontend, read_cmvn

# WeNet's options and defaults, section by section. These are options of ours, too:
ENCODER = dict(
    output_size=256,
    attention_heads=4,
    linear_units=2048,
    num_blocks=6,
    input_layer="conv2d",
    dropout_rate=0.1,
    attention_dropout_rate=0.0,
    use_dynamic_chunk=False,
    use_dynamic_left_chunk=False,
)
ENCODERS = {
    "conformer": dict(
        ENCODER,
        pos_enc_layer_type="rel_pos",
        selfattention_layer_type="rel_selfattn",
        activation_type="swish",
        cnn_module_kernel=15,
        causal=False,
        cnn_module_norm="batch_norm",
    ),
    "transformer": dict(
        ENCODER,
        pos_enc_layer_type="abs_pos",
        selfattention_layer_type="selfattn",
        activation_type="relu",
    ),
}
# Ours are called decoder_attention_heads and so on.
DECODER = dict(attention_heads=4, linear_units=2048, num_blocks=6)
DECODERS = {"bitransformer": dict(DECODER, r_num_blocks=0), "transformer": DECODER}
MODEL = dict(ctc_weight=0.5, reverse_weight=0.0, lsm_weight=0.0, length_normalized_loss=False)
# These options have only one value here:
LAYERS = dict(
    normalize_before=True,
    concat_after=False,
    query_bias=True,
    key_bias=True,
    value_bias=True,
    n_kv_head=None,
    head_dim=None,
    layer_norm_type="layer_norm",
    norm_eps=1e-5,
    mlp_type="position_wise_feed_forward",
    mlp_bias=True,
)
ENCODER_FIXED = dict(
    LAYERS,
    static_chunk_size=0,
    positionwise_conv_kernel_size=1,
    macaron_style=True,
    use_cnn_module=True,
    conv_bias=True,
    conv_norm_eps=1e-5,
    conv_inner_factor=2,
    final_norm=True,
)
DECODER_FIXED = dict(
    LAYERS,
    input_layer="embed",
    use_output_layer=True,
    src_attention=True,
    activation_type="relu",
    tie_word_embedding=False,
    src_query_bias=True,
    src_key_bias=True,
    src_value_bias=True,
)
# These options do not change what a trained model computes:
FREE = {
    "dropout_rate",
    "positional_dropout_rate",
    "self_attention_dropout_rate",
    "src_attention_dropout_rate",
    "gradient_checkpointing",
    "use_sdpa",
    "n_expert",
    "n_expert_activated",
}
CHOICES = {field.name: field.metadata["choices"] for field in dataclasses.fields(ModelOptions)}
CMVN = ("encoder.global_cmvn.mean", "encoder.global_cmvn.istd")
UNITS = ("units.txt", "words.txt", "lang_char.txt")  # its names in WeNet's recipes and releases


# ---- Weights


def wenet_names(name: str, net: U2Conformer) -> list[str]:
    """Gives WeNet's name of our weight `name`; two names where it holds both keys and values."""
    left = "decoder." if net.right_decoder is None else "decoder.left_decoder."
    out = "embed.out.0." if net.options.input_layer == "conv2d" else "embed.linear."
    # WeNet counts the activations between the convolutions, too.
    name = re.sub(r"embed\.convs\.(\d)", lambda found: f"embed.conv.{2 * int(found[1])}", name)
    for ours, theirs in (
        (r"embed\.out\.", out),
        (r"encoder\.cmvn_", "encoder.global_cmvn."),
        (r"^ctc\.", "ctc.ctc_lo."),
        (r"encoder\.blocks\.", "encoder.encoders."),
        (r"decoder\.blocks\.", "decoder.decoders."),
        (r"decoder\.embed\.", "decoder.embed.0."),
        (r"^decoder\.", left),
        (r"^right_decoder\.", "decoder.right_decoder."),
    ):
        name = re.sub(ours, theirs, name)
    if "linear_kv" in name:
        return [name.replace("linear_kv", part) for part in ("linear_k", "linear_v")]
    return [name]


def to_wenet(net: U2Conformer) -> dict[str, torch.Tensor]:
    """Gives the weights of `net` under WeNet's names, in WeNet's shapes."""
    theirs = {}
    for name, value in net.state_dict().items():
        names = wenet_names(name, net)
        if "pointwise" in name and name.endswith("weight"):
            value = value[..., None]  # (out,in) -> (out,in,1), a convolution there
        theirs.update(zip(names, value.chunk(2) if len(names) == 2 else [value]))
    return theirs


def position_tables(net: U2Conformer) -> list[str]:
    """Names the tables of sinusoids that WeNet keeps beside the weights since 2023."""
    decoders = ["decoder.left_decoder", "decoder.right_decoder"]
    if net.right_decoder is None:
        decoders = ["decoder"]
    return ["encoder.embed.pos_enc.pe", *(f"{decoder}.embed.1.pe" for decoder in decoders)]


def from_wenet(weights: dict, net: U2Conformer) -> dict[str, torch.Tensor]:
    """Gives WeNet's weights under our names, for net.load_state_dict.

    Where the weights lack CMVN, `net` keeps its own. Raises UserError for a weight that is missing,
    left over or of another shape.
    """
    expected = to_wenet(net)
    given = {name: value for name, value in weights.items() if name not in position_tables(net)}
    check_positions(weights, net)
    if not any(name in given for name in CMVN):
        given.update((name, expected[name]) for name in CMVN)
    check_weights(given, expected)
    ours = {}
    for name, value in net.state_dict().items():
        parts = [given[part] for part in wenet_names(name, net)]
        ours[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(value.shape)
    return ours


def check_weights(given: dict, expected: dict) -> None:
    for names, problem in (
        (expected.keys() - given.keys(), "is missing"),
        (given.keys() - expected.keys(), "belongs to nothing that train.yaml describes"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"final.pt: {shown(min(names), 100)} {problem}{more}")
    for name, value in expected.items():
        theirs = given[name]
        if theirs.shape != value.shape:
            raise UserError(
                f"final.pt: {name} has shape {tuple(theirs.shape)}, "
                f"not train.yaml's {tuple(value.shape)}"
            )
        if theirs.is_floating_point() != value.is_floating_point():
            raise UserError(f"final.pt: {name} is of {theirs.dtype}, not {value.dtype}")


def check_positions(weights: dict, net: U2Conformer) -> None:
    """Raises UserError for a table that is not ours to 0.01, the precision of position 5000."""
    width = net.options.output_size
    for name in position_tables(net):
        table = weights.get(name)
        if table is None:
            continue
        fits = table.dim() == 3 and table.size(2) == width
        if not fits or not torch.allclose(
            table.float(), sinusoids(table.size(1), width)[None], atol=1e-2
        ):
            raise UserError(f"final.pt: {name} does not hold the sines and cosines of positions")


def read_weights(path: str) -> dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise UserError("no final.pt in it")
    try:
        weights = read_weights_only(path)
    except UserError as error:
        raise UserError(f"final.pt: {error}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not isinstance(weights, dict) or not weights:
        raise UserError("final.pt: holds no weights by name")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"final.pt: {shown(name, 100)} is no tensor")
    if name := not_finite({"state_dict": weights}):
        raise UserError(f"final.pt: {name} is not finite; use a model from before")
    return weights


# ---- Train.yaml


def read_config(path: str) -> dict:
    try:
        # WeNet's have 2 kB; 256 kB keep YAML's parser busy for a second.
        config = parse_yaml(read_text(path, 2**18))
    except OSError as error:
        raise UserError(
            f"train.yaml: {error.strerror}; name an experiment directory of WeNet, "
            "with train.yaml, final.pt and units.txt"
        ) from None
    except ValueError as error:
        raise UserError(f"train.yaml: no YAML, or damaged ({error})") from None
    if not isinstance(config, dict):
        raise UserError("train.yaml: holds no options by name")
    return config


def section(config: dict, name: str) -> dict:
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"train.yaml: {name} must hold options by name")
    return value or {}


def choose(config: dict, name: str, default: str, choices) -> str:
    value = config.get(name, default)
    if value not in tuple(choices):
        raise UserError(
            f"train.yaml: {name} {brief(value)} is not supported, only {' and '.join(choices)}"
        )
    return value


def take(config: dict, name: str, defaults: dict, fixed: dict, free=()) -> dict:
    """Gives the options `defaults` of a section, with WeNet's defaults for those not given.

    Raises UserError for an option that is in none of defaults, fixed and free, for a value of
    another type or range, and for another value than the one in `fixed`.
    """
    given = section(config, name)
    for key, value in given.items():
        if key in defaults:
            check_value(f"train.yaml: {name}: {key}", value, defaults[key], CHOICES.get(key))
        elif key in free:
            continue
        elif key not in fixed:
            raise UserError(f"train.yaml: {name}: {shown(key, 100)} is not supported")
        elif value != fixed[key] or isinstance(value, bool) != isinstance(fixed[key], bool):
            raise UserError(
                f"train.yaml: {name}: {key} {brief(value)} is not supported, only {fixed[key]!r}"
            )
    return {key: given.get(key, default) for key, default in defaults.items()}


def check_value(where: str, value, default, choices) -> None:
    kind = type(default)
    kinds = (int, float) if kind is float else kind
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kinds):
        raise UserError(f"{where} is {brief(value)}; it must be {kind.__name__}")
    if choices and value not in choices:
        raise UserError(f"{where} {brief(value)} is not supported, only {' and '.join(choices)}")
    if kind is float and not 0 <= value <= 1 or kind is int and value < min(default, 1):
        raise UserError(f"{where} is {brief(value)}, out of range")


def read_options(config: dict, weights: dict) -> ModelOptions:
    for name, default in (("model", "asr_model"), ("ctc", "ctc")):
        choose(config, name, default, [default])
    kind = choose(config, "encoder", "conformer", ENCODERS)
    two_way = choose(config, "decoder", "bitransformer", DECODERS) == "bitransformer"
    decoders = DECODERS["bitransformer" if two_way else "transformer"]
    is_dynamic = section(config, "encoder_conf").get("use_dynamic_chunk") is True
    unread = {"static_chunk_size"} if is_dynamic else set()  # WeNet does not read it then
    encoder = take(config, "encoder_conf", ENCODERS[kind], ENCODER_FIXED, FREE | unread)
    decoder = take(config, "decoder_conf", decoders, DECODER_FIXED, FREE)
    model = take(config, "model_conf", MODEL, {"apply_non_blank_embedding": False}, {"ignore_id"})
    if model["reverse_weight"] and not two_way:
        raise UserError(
            f"train.yaml: reverse_weight {model['reverse_weight']} needs decoder bitransformer"
        )
    width = encoder["output_size"]
    heads = decoder["attention_heads"]
    if width % encoder["attention_heads"] or width % heads or width % 2:
        raise UserError(
            f"train.yaml: output_size {width} must be even and divisible by attention_heads"
        )
    # WeNet before 2023 took the kind of attention from the kind of positions alone.
    has_positions = any(".linear_pos." in name for name in weights)
    if encoder["pos_enc_layer_type"] == "abs_pos" and not has_positions:
        encoder["selfattention_layer_type"] = "selfattn"
    return ModelOptions(
        encoder=kind,
        **encoder,
        **model,
        keep_right_decoder=two_way and not model["reverse_weight"],
        decoder_num_blocks=decoder["num_blocks"],
        r_num_blocks=decoder.get("r_num_blocks", 0),
        decoder_linear_units=decoder["linear_units"],
        decoder_attention_heads=0 if heads == encoder["attention_heads"] else heads,
    )


def read_frontend(config: dict) -> Frontend:
    data = section(config, "dataset_conf")
    if not data and "collate_conf" in config:
        raise UserError(
            "train.yaml: collate_conf is of a WeNet before dataset_conf; write its features as "
            "fbank_conf there"
        )
    choose(data, "feats_type", "fbank", ["fbank"])
    bins = config.get("input_dim", 80)
    check_value("train.yaml: input_dim", bins, 80, None)
    fbank = take(
        data,
        "fbank_conf",
        dict(num_mel_bins=bins, frame_length=25, frame_shift=10),
        dict(window_type="povey"),
        {"dither"},
    )
    if fbank["num_mel_bins"] != bins:
        raise UserError(
            f"train.yaml: input_dim {bins} is not the {fbank['num_mel_bins']} num_mel_bins of "
            "fbank_conf"
        )
    rate = take(data, "resample_conf", dict(resample_rate=16000), {})["resample_rate"]
    return Frontend(frontend="fbank", sample_rate=rate, **fbank)


# ---- The other files


def find_file(folder: str, named, *usual: str) -> str:
    """Gives the path of a file of the experiment.

    `named` is what train.yaml calls it: its own name is looked for in `folder` first, then its
    path. Where train.yaml does not name it, the first of the names `usual` that is there is taken.
    """
    names = [os.path.basename(str(named)), str(named)] if named else usual
    for name in names:
        if os.path.isfile(path := os.path.join(folder, name)):
            return path
    source = f", which train.yaml names as {shown(str(named), 100)}" if named else ""
    raise UserError(f"no {shown(names[0], 100)} in it{source}")


def read_units(path: str) -> list[str]:
    """Reads the tokens of a units.txt, lines of `token id`, in the order of their ids."""
    name = os.path.basename(path)
    try:
        pairs = [line.split() for line in read_text(path).split("\n") if line.strip()]
        ids = {token: int(i) for token, i in pairs}
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{name}: each line must hold a token and its id") from None
    if sorted(ids.values()) != list(range(len(pairs))) or not ids:
        raise UserError(
            f"{name}: the tokens must be distinct and their ids 0, 1, 2, ... without gaps"
        )
    return sorted(ids, key=ids.get)


def read_sentencepiece(config: dict, folder: str, tokens: list[str] | None) -> dict | None:
    """Reads what Tokenizer takes as `sentencepiece`, or gives None.

    train.yaml names the model. An old train.yaml names none; then a model is needed where tokens
    are pieces of more than one character.
    """
    kind = config.get("tokenizer")
    if kind == "char":
        return None
    if kind is None and not any(BPE_SPACE in token and len(token) > 1 for token in tokens):
        return None
    key = "model_path" if kind == "sentencepiece" else "bpe_path"
    named = section(config, "tokenizer_conf").get(key)
    usual = [os.path.basename(path) for path in glob.glob(f"{glob.escape(folder)}/*.model")]
    if not named and len(usual) != 1:
        raise UserError(
            "its tokens are pieces of a sentencepiece model; put that one model into it, as "
            "NAME.model"
        )
    path = find_file(folder, named, *usual)
    try:
        model = read_small(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {why(error)}") from None
    if not model:
        raise UserError("the sentencepiece model is an empty file")
    return {"model": base64.b64encode(model).decode(), "han": kind != "sentencepiece"}


def check_tokenizer_conf(config: dict) -> None:
    conf = section(config, "tokenizer_conf")
    kind = config.get("tokenizer")
    if kind is not None:
        choose(config, "tokenizer", "char", ["char", "bpe", "sentencepiece"])
    unsupported = ["non_lang_syms_path", "connect_symbol"]
    if kind != "bpe":
        unsupported.append("split_with_space")
    for name in unsupported:
        if conf.get(name):
            raise UserError(
                f"train.yaml: tokenizer_conf: {name} {brief(conf[name])} is not supported; where "
                "no transcript needs it, remove it"
            )


def make_tokenizer(config: dict, folder: str) -> Tokenizer:
    check_tokenizer_conf(config)
    tokens = None
    if config.get("tokenizer") != "sentencepiece":
        named = section(config, "tokenizer_conf").get("symbol_table_path")
        tokens = read_units(find_file(folder, named, *UNITS))
    model = read_sentencepiece(config, folder, tokens)
    try:
        tokens = tokens or pieces_of(model)
        if config.get("output_dim", len(tokens)) != len(tokens):
            raise UserError(
                f"train.yaml: output_dim is {brief(config['output_dim'])}, but there are "
                f"{len(tokens)} tokens"
            )
        space = "<space>" if "<space>" in tokens else BPE_SPACE
        ids = special_ids(config, tokens)
        return Tokenizer(tokens=tokens, space=space, sentencepiece=model, **ids)
    except (RuntimeError, OSError, ImportError) as error:
        raise UserError(f"the sentencepiece model cannot be read ({error})"[:200]) from error


def pieces_of(model: dict) -> list[str]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(model["model"]))
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def special_ids(config: dict, tokens: list[str]) -> dict[str, int]:
    """Gives blank_id, unk_id, sos_id and eos_id.

    blank_id is train.yaml's ctc_blank_id where it has one. Otherwise blank_id and unk_id are those
    of the tokens <blank> and <unk>, then train.yaml's special_tokens, then WeNet's defaults.
    """
    named = section(section(config, "tokenizer_conf"), "special_tokens")
    known = {token: i for i, token in enumerate(tokens)}
    default = known.get("<blank>", named.get("<blank>", 0))
    blank = section(config, "ctc_conf").get("ctc_blank_id", default)
    if blank != known.get("<blank>", blank):
        raise UserError(
            f"train.yaml: ctc_blank_id is {brief(blank)}, but <blank> is token {known['<blank>']}"
        )
    ids = {
        "blank_id": blank,
        "unk_id": known.get("<unk>", named.get("<unk>", blank)),
        "sos_id": named.get("<sos>", len(tokens) - 1),
        "eos_id": named.get("<eos>", len(tokens) - 1),
    }
    for name, value in ids.items():
        if type(value) is not int or not 0 <= value < len(tokens):
            raise UserError(
                f"train.yaml: {name} {brief(value)} is none of the {len(tokens)} tokens"
            )
    return ids


def cmvn_file(config: dict) -> str | None:
    """Gives train.yaml's name for its file of CMVN, or None where the model has none."""
    if "cmvn" in config:
        if config["cmvn"] is None:
            return None
        choose(config, "cmvn", "", ["global_cmvn"])
        return section(config, "cmvn_conf").get("cmvn_file") or "global_cmvn"
    return config.get("cmvn_file")  # where an older WeNet named it


def load_cmvn(model: U2, config: dict, folder: str, weights: dict) -> None:
    """Sets the global CMVN of the file.

    Where the weights hold CMVN, the file may be missing: the weights are loaded later and replace
    its CMVN, as in WeNet.
    """
    is_held = any(name in weights for name in CMVN)
    name = cmvn_file(config)
    if name is None:
        if is_held:
            raise UserError(
                f"final.pt: {CMVN[0]} belongs to nothing that train.yaml describes: it names no "
                "cmvn"
            )
        return
    try:
        path = find_file(folder, name)
    except UserError:
        if is_held:
            return
        raise
    mean, istd = read_cmvn(path)
    if len(mean) != model.frontend.num_mel_bins:
        raise UserError(
            f"{path}: it is for {len(mean)} mel bins, not {model.frontend.num_mel_bins}"
        )
    model.set_cmvn(mean, istd)


def load_wenet(exp_dir: str) -> tuple[U2, Tokenizer, Frontend]:
    """Loads (model in evaluation mode, tokenizer, frontend) from an experiment directory of WeNet.

    Raises UserError for what is missing, damaged or not supported.
    """
    try:
        config = read_config(os.path.join(exp_dir, "train.yaml"))
        weights = read_weights(os.path.join(exp_dir, "final.pt"))
        options = read_options(config, weights)
        frontend = read_frontend(config)
        tokenizer = make_tokenizer(config, exp_dir)
        # The weights are checked before any memory is taken for the model.
        from_wenet(weights, skeleton(options, frontend, tokenizer, len(weights)))
        model = U2(options=options, optim=OptimOptions(), frontend=frontend, tokenizer=tokenizer)
        load_cmvn(model, config, exp_dir, weights)
        model.net.load_state_dict(from_wenet(weights, model.net))
    except UserError as error:
        raise UserError(f"{exp_dir}: {error}") from error
    return model.eval(), tokenizer, frontend


# ---- The way back


def wenet_config(model: U2, has_cmvn: bool) -> dict:
    """Makes the train.yaml of `model`."""
    o = model.options
    dropouts = dict(dropout_rate=o.dropout_rate, positional_dropout_rate=o.dropout_rate)
    encoder_conf = {name: getattr(o, name) for name in ENCODERS[o.encoder]}
    decoder_conf = dict(
        attention_heads=o.decoder_attention_heads or o.attention_heads,
        linear_units=o.decoder_linear_units,
        num_blocks=o.decoder_num_blocks,
    )
    is_two_way = model.net.right_decoder is not None
    if is_two_way:
        decoder_conf["r_num_blocks"] = o.r_num_blocks
    return dict(
        input_dim=model.frontend.num_mel_bins,
        output_dim=model.tokenizer.vocab_size,
        cmvn="global_cmvn" if has_cmvn else None,
        cmvn_conf=dict(cmvn_file="global_cmvn", is_json_cmvn=True),
        encoder=o.encoder,
        encoder_conf=encoder_conf | dropouts | dict(normalize_before=True),
        decoder="bitransformer" if is_two_way else "transformer",
        decoder_conf=decoder_conf
        | dropouts
        | dict(
            self_attention_dropout_rate=o.attention_dropout_rate,
            src_attention_dropout_rate=o.attention_dropout_rate,
        ),
        **tokenizer_config(model.tokenizer),
        ctc="ctc",
        ctc_conf=dict(ctc_blank_id=model.tokenizer.blank_id),
        model="asr_model",
        model_conf={name: getattr(o, name) for name in MODEL},
        dataset_conf=dataset_conf(model.frontend),
    )


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    roles = ("blank", "unk", "sos", "eos")
    conf = dict(
        symbol_table_path="units.txt",
        non_lang_syms_path=None,
        split_with_space=False,
        special_tokens={f"<{role}>": getattr(tokenizer, f"{role}_id") for role in roles},
    )
    if tokenizer.sentencepiece is None:
        return dict(tokenizer="char", tokenizer_conf=conf)
    if tokenizer.sentencepiece["han"]:
        return dict(tokenizer="bpe", tokenizer_conf=conf | dict(bpe_path="bpe.model"))
    return dict(tokenizer="sentencepiece", tokenizer_conf=conf | dict(model_path="bpe.model"))


def dataset_conf(frontend: Frontend) -> dict:
    """Describes the frontend, and the rest that WeNet's recognize.py asks for."""
    fbank_conf = dict(
        num_mel_bins=frontend.num_mel_bins,
        frame_length=frontend.frame_length,
        frame_shift=frontend.frame_shift,
        dither=0.0,
    )
    return dict(
        filter_conf={},
        resample_conf=dict(resample_rate=frontend.sample_rate),
        speed_perturb=False,
        spec_aug=False,
        fbank_conf=fbank_conf,
        shuffle=False,
        sort=False,
        batch_conf=dict(batch_type="static", batch_size=16),
    )


def check_exportable(model: U2) -> None:
    if not model.frontend.is_wenets:
        kind = model.frontend.frontend
        raise UserError(
            f"its features are {kind}{' with a high_freq' * (kind == 'fbank')}, which WeNet does "
            "not have; train with --frontend fbank to export"
        )
    if model.tokenizer.merges is not None:
        raise UserError(
            "its tokenizer is of byte pairs, which WeNet does not have; train with one of "
            "characters to export"
        )
    tokenizer = model.tokenizer
    special = {tokenizer.blank_id, tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id}
    longer = (len(token) > 1 and i not in special for i, token in enumerate(tokenizer.tokens))
    if tokenizer.wav2vec2 and (tokenizer.wav2vec2["do_lower_case"] or any(longer)):
        raise UserError(
            "its tokenizer is one of transformers that lowers case or has tokens of several "
            "characters, which WeNet does not have; train with one of characters to export"
        )
    o = model.options
    if o.encoder == "transformer" and o.selfattention_layer_type != "selfattn":
        raise UserError("WeNet's transformer encoder has no selfattention_layer_type rel_selfattn")


def cmvn_json(mean, istd) -> str:
    """Makes sums over one frame that give `mean` and `istd` (F,) back."""
    mean = mean.double()
    squares = istd.double() ** -2 + mean**2
    return json.dumps({"mean_stat": mean.tolist(), "var_stat": squares.tolist(), "frame_num": 1})


def exported_files(model: U2) -> dict[str, bytes]:
    """Makes the files of an experiment directory. CMVN that changes nothing is left out."""
    mean = model.net.encoder.cmvn_mean
    istd = model.net.encoder.cmvn_istd
    has_cmvn = bool((mean != 0).any() or (istd != 1).any())
    config = wenet_config(model, has_cmvn)
    pieces = model.tokenizer.sentencepiece
    tokens = model.tokenizer.tokens
    if pieces is None:
        tokens = [BPE_SPACE if token == model.tokenizer.space else token for token in tokens]
    files = {
        "train.yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode(),
        "units.txt": unit_lines(tokens, "units.txt").encode(),
    }
    if has_cmvn:
        files["global_cmvn"] = cmvn_json(mean, istd).encode()
    if pieces:
        files["bpe.model"] = base64.b64decode(pieces["model"])
    return files | {"final.pt": weights_file(model.net, has_cmvn)}


def weights_file(net: U2Conformer, has_cmvn: bool) -> bytes:
    weights = to_wenet(net)
    if not has_cmvn:
        weights = {name: value for name, value in weights.items() if name not in CMVN}
    table = sinusoids(5000, net.options.output_size)[None]
    weights.update((name, table) for name in position_tables(net))
    buffer = io.BytesIO()
    torch.save({name: value.contiguous().clone() for name, value in weights.items()}, buffer)
    return buffer.getvalue()


# ---- The command


def import_model(exp_dir: str, out: str) -> str:
    model, tokenizer, _ = load_wenet(exp_dir)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(out, buffer.getvalue())
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{out}: {parameters / 1e6:.2f} M parameters, {model.options.encoder} encoder, vocabulary "
        f"{tokenizer.vocab_size}; for score.py, transcribe.py and train.py --init_from"
    )


def export_model(checkpoint: str, out: str, overwrite: bool) -> str:
    with published(out, "an experiment directory of --export", overwrite, (checkpoint,)) as folder:
        model, _, frontend = load_checkpoint(checkpoint)
        try:
            check_exportable(model)
            files = exported_files(model)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
    said = (
        f"{out}: {', '.join(files)}; WeNet resolves their names in train.yaml from the folder that "
        "it runs in"
    )
    if frontend.tail_padding:
        said += f"; put {frontend.tail_padding} ms of zeros behind each recording, as in training"
    return said


def files_of(folder: str) -> set[tuple[int, int]]:
    """Returns the identities of the files in a folder; links that lead nowhere have none."""
    return {*map(identity, glob.glob(f"{glob.escape(folder)}/*"))} - {None}


def main(argv: list[str]) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "exp_dir", nargs="?", metavar="EXP_DIR", help="experiment directory of WeNet to import"
    )
    parser.add_argument(
        "--export", metavar="MODEL.ckpt", help="checkpoint to make an experiment directory of"
    )
    parser.add_argument(
        "--out", required=True, help="checkpoint to write; with --export the directory"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the checkpoint, or the directory of an earlier --export",
    )
    args = parser.parse_args(argv)
    if (args.exp_dir is None) == (args.export is None):
        raise UserError("give EXP_DIR to import, or --export MODEL.ckpt (--help lists the flags)")
    if args.export:
        print(shown(export_model(args.export, args.out, args.overwrite)))
    elif os.path.lexists(args.out) and not args.overwrite:
        raise UserError(f"--out {args.out} exists; name another, or add --overwrite")
    elif identity(args.out) in files_of(args.exp_dir):
        raise UserError(f"--out {args.out} is a file of {args.exp_dir}; name another")
    elif not args.out.endswith(".ckpt"):
        raise UserError(f"--out {args.out}: a checkpoint's name ends in .ckpt")
    else:
        print(shown(import_model(args.exp_dir, args.out)))


if __name__ == "__main__":
    run(main)
