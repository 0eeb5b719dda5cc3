"""Doors into other people's tools. Each needs its extra; importing wina imports none of them."""
