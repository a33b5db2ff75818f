"""A trained model for use elsewhere, compared with the model on real images before it is called done.

`python -m models.export ckpt=outputs/mine format=onnx -o mine.onnx`; formats: `models.export.formats`.
"""
