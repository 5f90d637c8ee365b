"""Published peak rates of accelerators, for model FLOP utilisation."""

# Dense bfloat16 operations per second, NVIDIA data sheets (without sparsity); the first match names the card.
_PEAK_BFLOAT16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_bfloat16_flops(device_name: str) -> float | None:
    """Operations per second of the card that `device_name` names, or None where we know no published figure."""
    return next((peak for card, peak in _PEAK_BFLOAT16.items() if card in device_name), None)
