"""Names of the functions of torch that take sizes."""

VIEWS = ("view", "reshape", "expand", "broadcast_to")
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
