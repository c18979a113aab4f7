//! A frozen convolution whose windows do not overlap: a picture's patches, each a row, times a matrix.

use std::sync::Arc;

use engraft_tensor::Tensor;

use crate::linear::Linear;
use crate::{Error, Pass, Result, Role, Sites, Weight};

/// Patches of `size` × `size` pixels → rows [pictures · patches, out].
#[derive(Clone)]
pub struct Convolution {
    /// The matrix on the windows, [out, channels · size · size], with its bias.
    matrix: Linear,
    channels: usize,
    size: usize,
}

impl Convolution {
    /// Declares the sites `path` and, with a bias, `path.bias`. `weight` is [out, channels · size · size]; `tensor` is the
    /// module's name in the model's files.
    pub fn declare(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        (channels, size): (usize, usize),
        weight: Arc<Weight>,
        bias: Option<Tensor>,
    ) -> Convolution {
        let matrix = Linear::declare_convolution(
            sites,
            (path, tensor),
            Role::PatchEmbed,
            (channels, size),
            weight,
            bias,
        );
        Convolution { matrix, channels, size }
    }

    /// Pictures [n, channels, height, width] → rows [n · patches, out], the patches of a picture row by row, and the
    /// number of patches down and across. Pixels beyond the last whole patch are left out, as in a convolution.
    pub fn forward(&self, pixels: &Tensor, sites: &Sites, cx: &Pass) -> Result<Tensor> {
        let (down, across) = self.grid(pixels)?;
        let (n, c, p) = (pixels.dim(0), self.channels, self.size);
        let whole = pixels.narrow(2, 0, down * p)?.narrow(3, 0, across * p)?;
        // [n, c, down, p, across, p] → [n, down, across, c, p, p]
        let windows = whole.reshape([n, c, down, p, across, p])?.permute(&[0, 2, 4, 1, 3, 5])?;
        self.matrix.forward(&windows.reshape([n * down * across, c * p * p])?, sites, cx)
    }

    /// Patches down and across a picture.
    pub fn grid(&self, pixels: &Tensor) -> Result<(usize, usize)> {
        let &[_, channels, height, width] = pixels.shape() else {
            let message =
                format!("expected pictures [n, channels, height, width], found {:?}", pixels.shape());
            return Err(Error::Unsupported(message));
        };
        if channels != self.channels {
            let message = format!("expected pictures with {} channels, found {channels}", self.channels);
            return Err(Error::Unsupported(message));
        }
        if height < self.size || width < self.size {
            let message = format!(
                "expected pictures of at least {0} × {0} pixels, found {height} × {width}",
                self.size
            );
            return Err(Error::Unsupported(message));
        }
        Ok((height / self.size, width / self.size))
    }
}
