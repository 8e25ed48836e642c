"""Animation files in memory: one codec per format, and encoding, decoding and probing by the format's name."""

from pia_batch.media.codecs.codec import Codec, Frames, FrameStream, MediaInfo
from pia_batch.media.codecs.table import CODECS, comments, decode, encode, probe

__all__ = ["CODECS", "Codec", "FrameStream", "Frames", "MediaInfo", "comments", "decode", "encode", "probe"]
