"""A transformer encoder in NumPy or CuPy whose gradients are written by hand.

`layers.py` and `attention.py` hold the layers, `model.py` puts them together, `optimizer.py` trains
it, `measure.py` says what a step costs. `pathfinder.py` and `genome.py` beside this folder use it.
"""
