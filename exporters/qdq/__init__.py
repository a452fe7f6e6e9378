"""Write a plan into a float graph: codes, scales, QuantizeLinear and DequantizeLinear.

Inputs are the float graph and the codes of the weights. The output is a graph of standard operators whose products a
runtime executes on codes; only the rounding of NVFP4 inputs uses an operator of TensorRT. Each runtime has a table of
`Lowering` rows (`lowerings.py` in its folder); a row names the function of `lowering.py` that writes a scheme.
"""
