"""Bit codecs shared by the ops: narrow floats, packed nibbles and power-of-two scales, to and from float32."""
