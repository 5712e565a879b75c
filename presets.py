"""This file has the sizes of a model as data: the presets, and every option with its bounds."""

from cli import UserError, option, options_class

# A flag overrides the preset; an option that the preset does not name has its default below.
# Ruff leaves both tables as they are:
# fmt: off
PRESETS = {
    "tiny": dict(output_size=64, linear_units=256, num_blocks=4, cnn_module_kernel=15,
                 decoder_linear_units=256, decoder_num_blocks=1, r_num_blocks=1,
                 attention_heads=4, attention_dropout_rate=0.0),
    "small": dict(output_size=144, linear_units=576, num_blocks=6, cnn_module_kernel=15,
                  decoder_linear_units=576, decoder_num_blocks=2, r_num_blocks=1,
                  attention_heads=4, attention_dropout_rate=0.0),
    "base": dict(output_size=256, linear_units=2048, num_blocks=12, cnn_module_kernel=8,
                 decoder_linear_units=2048, decoder_num_blocks=3, r_num_blocks=3,
                 attention_heads=4),
}


@options_class
class ModelOptions:
    """Holds architecture and loss, by WeNet's names. Raises UserError for sizes that do not fit."""

    encoder: str = option("conformer", "blocks of the encoder",
                          choices=("conformer", "transformer"))
    output_size: int = option(256, "model width D", at_least=2, at_most=8192)
    attention_heads: int = option(4, "attention heads, in encoder and decoders",
                                  at_least=1, at_most=256)
    linear_units: int = option(2048, "feed-forward width of the encoder", at_least=1, at_most=2**16)
    num_blocks: int = option(12, "encoder blocks", at_least=1, at_most=200)
    activation_type: str = option("swish", "activation of the encoder", choices=("swish", "relu"))
    pos_enc_layer_type: str = option(
        "rel_pos", "positions in the attention alone, or also added to its input (abs_pos)",
        choices=("rel_pos", "abs_pos"))
    selfattention_layer_type: str = option(
        "rel_selfattn", "the encoder's attention with or without a term for positions",
        choices=("rel_selfattn", "selfattn"))
    cnn_module_kernel: int = option(8, "kernel of the depthwise convolution, in encoder frames",
                                    at_least=1, at_most=1000)
    causal: bool = option(
        True, "the depthwise convolution sees the past only (needed for streaming)")
    cnn_module_norm: str = option("layer_norm", "norm in the convolution module",
                                  choices=("layer_norm", "batch_norm"))
    input_layer: str = option("conv2d", "subsampling of the features by 4, 6 or 8",
                              choices=("conv2d", "conv2d6", "conv2d8"))
    decoder_num_blocks: int = option(3, "blocks of the left-to-right decoder",
                                     at_least=1, at_most=200)
    r_num_blocks: int = option(
        3, "blocks of the right-to-left decoder (U2++); unused with reverse_weight 0 (U2)",
        at_least=0, at_most=200)
    decoder_linear_units: int = option(2048, "feed-forward width of the decoders",
                                       at_least=1, at_most=2**16)
    decoder_attention_heads: int = option(
        0, "attention heads of the decoders; 0: as many as in the encoder",
        at_least=0, at_most=256)
    keep_right_decoder: bool = option(
        False, "with reverse_weight 0: have a right-to-left decoder, which is not trained")
    dropout_rate: float = option(0.1, "dropout in every block", at_least=0.0, at_most=0.9)
    attention_dropout_rate: float = option(0.1, "dropout on attention weights",
                                           at_least=0.0, at_most=0.9)
    ctc_weight: float = option(0.3, "loss = ctc_weight CTC + (1 - ctc_weight) attention",
                               at_least=0.0, at_most=1.0)
    reverse_weight: float = option(
        0.3, "share of the right-to-left decoder in the attention loss; 0 makes it U2",
        at_least=0.0, at_most=1.0)
    lsm_weight: float = option(0.1, "label smoothing of the attention loss",
                               at_least=0.0, at_most=1.0)
    length_normalized_loss: bool = option(
        False, "attention loss per label instead of per utterance")
    cr_ctc_weight: float = option(
        0.0,
        "train on two augmented views of each row, whose CTC outputs shall agree (CR-CTC, "
        "arXiv:2410.05101, which takes 0.2); 0: off",
        at_least=0.0, at_most=10.0)
    interctc_weight: float = option(
        0.0,
        "share of a second CTC loss, of the middle block's output, in the CTC loss (InterCTC, "
        "arXiv:2102.03216, which takes 0.3); 0: off",
        at_least=0.0, at_most=0.9)
    stochastic_depth: float = option(
        0.0,
        "how often training leaves the last block of the encoder out for a row, and blocks before "
        "in proportion to their depth (arXiv:1603.09382); 0: off",
        at_least=0.0, at_most=0.9)
    use_dynamic_chunk: bool = option(
        True, "train on full context or a random chunk of at most 100 feature frames, 1 s with "
        "--frame_shift 10 (U2, section 2.3)")
    use_dynamic_left_chunk: bool = option(
        False, "also draw how many chunks to the left are seen in training")
    # fmt: on

    @property
    def views(self) -> int:
        """Returns how many augmented views of each row a training batch has."""
        return 2 if self.cr_ctc_weight > 0 else 1

    def __post_init__(self):
        width = self.output_size
        heads = self.attention_heads
        if width % heads or width % (self.decoder_attention_heads or heads) or width % 2:
            raise UserError(
                f"--output_size {width} must be even and divisible by --attention_heads {heads} "
                "and by --decoder_attention_heads"
            )
        if self.interctc_weight and self.num_blocks == 1:
            raise UserError("--interctc_weight with --num_blocks 1: there is no middle block")
        convolves = self.encoder == "conformer"
        if convolves and not self.causal and self.cnn_module_kernel % 2 == 0:
            raise UserError(
                f"--no-causal needs an odd --cnn_module_kernel, not {self.cnn_module_kernel}"
            )
