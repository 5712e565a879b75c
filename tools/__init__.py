"""Instruments and exchanges: run them as python -m tools.NAME; nothing above imports them."""
