//! Files of `torch.save`, which are not read: what they say in place of an error about a header.

/// Whether a file begins as `torch.save` writes it: a ZIP archive, in older versions a bare pickle.
pub(crate) fn is_pickle(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || matches!(bytes, [0x80, 2..=5, ..])
}

/// What to do about the pickle `name`, whose tensors belong into the file `to` beside it.
pub(crate) fn convert_once(name: &str, to: &str) -> String {
    format!(
        "`{name}`, a pickle, which can run code and is not read; convert it once, in that directory: python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in torch.load('{name}', weights_only=True).items()}}, '{to}', {{'format': 'pt'}})\""
    )
}
