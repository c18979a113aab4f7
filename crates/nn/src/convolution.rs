//! A frozen convolution whose windows do not overlap: a picture's patches, each a row, times a matrix.

use std::sync::Arc;

use engraft_tensor::Tensor;

use crate::linear::Linear;
use crate::{Error, Pass, Result, Role, Sites, Weight};

/// Patches of `height` × `width` pixels → rows [pictures · patches, out].
#[derive(Clone)]
pub struct Convolution {
    /// The matrix on the windows, [out, channels · height · width], with its bias.
    matrix: Linear,
    /// Channels, height and width.
    window: [usize; 3],
}

impl Convolution {
    /// Declares the sites `path` and, with a bias, `path.bias`. `weight` is [out, channels · height · width], for a
    /// `window` [channels, height, width]; `tensor` is the module's name in the model's files. Where these hold the
    /// kernels `flat`, the module is a linear layer on windows, and its patches have that form.
    pub fn declare(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        window: [usize; 3],
        flat: bool,
        weight: Arc<Weight>,
        bias: Option<Tensor>,
    ) -> Convolution {
        let role = Role::PatchEmbed;
        let matrix = if flat {
            Linear::declare(sites, (path, tensor), role, None, weight, bias)
        } else {
            Linear::declare_convolution(sites, (path, tensor), role, window, weight, bias)
        };
        Convolution { matrix, window }
    }

    /// Pictures [n, channels, height, width] → rows [n · patches, out], the patches of a picture row by row. Pixels beyond the last whole patch are left out, as in a convolution.
    pub fn forward(&self, pixels: &Tensor, sites: &Sites, cx: &Pass) -> Result<Tensor> {
        let (down, across) = self.grid(pixels)?;
        let (n, [c, high, wide]) = (pixels.dim(0), self.window);
        let whole = pixels.narrow(2, 0, down * high)?.narrow(3, 0, across * wide)?;
        // [n, c, down, high, across, wide] → [n, down, across, c, high, wide]
        let windows = whole.reshape([n, c, down, high, across, wide])?.permute(&[0, 2, 4, 1, 3, 5])?;
        self.matrix.forward(&windows.reshape([n * down * across, c * high * wide])?, sites, cx)
    }

    /// Patches down and across a picture.
    pub fn grid(&self, pixels: &Tensor) -> Result<(usize, usize)> {
        let &[_, channels, height, width] = pixels.shape() else {
            let message =
                format!("expected pictures [n, channels, height, width], found {:?}", pixels.shape());
            return Err(Error::Unsupported(message));
        };
        let [expected, high, wide] = self.window;
        if channels != expected {
            let message = format!("expected pictures with {expected} channels, found {channels}");
            return Err(Error::Unsupported(message));
        }
        if height < high || width < wide {
            let message =
                format!("expected pictures of at least {high} × {wide} pixels, found {height} × {width}");
            return Err(Error::Unsupported(message));
        }
        Ok((height / high, width / wide))
    }
}
