"""Names of the functions of torch that take sizes, or compute with them."""

VIEWS = ("view", "reshape", "expand", "broadcast_to", "sum_to_size")
FACTORIES = ("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full")
# Functions that compute with a size as a number, rather than make a tensor of that size.
ARITHMETIC = {
    f"{side}{name}"
    for side in ("", "r")
    for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "floor_divide", "pow", "mod",
                 "remainder", "true_divide", "divide", "multiply", "subtract", "clamp", "tensor",
                 "scalar_tensor", "as_tensor", "asarray", "full_like", "fill", "masked_fill",
                 "where", "lerp", "gt", "ge", "lt", "le", "eq", "ne")
}  # fmt: skip
# Functions that make numbers that depend on how many there are, or that are others for fewer.
SERIES = ("arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm",
           "tril_indices", "triu_indices", "bartlett_window", "blackman_window", "hamming_window",
           "hann_window", "kaiser_window", "normal", "vander")  # fmt: skip
# Norms that are called for their statistics: `nn` and `nn.functional` have others.
NORMS = ("native_layer_norm", "native_batch_norm", "native_group_norm")
# Losses that are divided by a size where no operation shows it.
LOSSES = ("kl_div", "multilabel_soft_margin_loss", "cross_entropy", "linear_cross_entropy")
