"""The small world of `omni.synthetic.world`, spoken, drawn and written on signs: the built-in data of the stages."""
