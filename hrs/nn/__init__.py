"""Layers of the HRS family. Each is a plain ``nn.Module`` over [B, T, d] that works in any dtype on any device."""
