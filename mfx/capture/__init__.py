"""Capture of a model's forward pass as a `torch.fx` graph, or the reason why there is none.

`symbolic` traces the model without running it, `dynamo` has TorchDynamo capture one call. Both make a `Captured`, whose
`binding` holds the conditions of a call and the way of its arguments to the graph; `guards` are the conditions on
modules, `named_steps` the modules that the user names as steps. May import ``mfx_passes``, `mfx.compat`, `mfx.text`,
`mfx.options` and `mfx.modules`.
"""
