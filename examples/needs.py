"""Imported before all else by the examples: where a package is missing, they end in one line that names it."""

import importlib.util
from pathlib import Path

PACKAGES = {"torch": "torch", "rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
ROOT = Path(__file__).resolve().parents[1]

missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
if importlib.util.find_spec("matmul_grad") is None:
    missing.append(str(ROOT))  # the checkout itself
if missing:
    raise SystemExit(f"missing for the examples: pip install {' '.join(missing)}")
