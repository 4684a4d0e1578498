"""mfx under ``torch.compile``: the backend ``"mfx"``, and a momentumized net called from compiled code.

The backend (`backend`, `compiled_graphs`) rewrites TorchDynamo's graph and hands the pieces to an inner backend. A net
that compiled code calls is one opaque operation: `call` is what Dynamo traces, `call_site` and `output_spec` describe
one call, `ops` and `site_run` run it. Imports `mfx.program` and the packages below it; of `mfx.net` it has only the
protocol in `callee`.
"""
