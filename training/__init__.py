"""From routing traces to published versions: data sets, predictors, training, evaluation, export."""
