"""A GPT-2-shaped language model in NumPy or CuPy whose gradients are written by hand.

`layers.py` and `attention.py` hold the layers, `model.py` puts them together, `optimizer.py` and
`training.py` train it, `data.py` brings the text. `train_gpt.py` beside this folder is the command.
"""
