"""The reference model: a small mixture-of-experts language model of our own, from texts to a report.

    packages -> texts -> tokenizer -> model -> loop -> report
    specmoe reference-moe texts|train|report

With it the whole way (model, traces, predictor, service) can be walked on a laptop, without a model hub.
docs/reference-moe.md tells what it is and how good.
"""
