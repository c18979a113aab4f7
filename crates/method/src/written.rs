//! What an adapter's file holds: every saved parameter, in the form in which its method saves it.

use engraft_nn::{Adapter, NamedParam, Result};
use engraft_tensor::{DType, Tensor};

use crate::Stored;
use crate::assemble::{Chosen, Named};
use crate::names::{kept, prefix};

/// The tensors of a file in the form in which each method trains its own.
pub(crate) fn as_trained(mut tensors: Named, methods: &[Chosen]) -> Result<Named> {
    for (number, (method, _)) in methods.iter().enumerate() {
        let before = prefix(methods, number);
        let (mut mine, mut others) = (Named::new(), Named::new());
        for (key, value) in tensors {
            match key.strip_prefix(&before) {
                Some(own) => mine.push((own.to_owned(), value)),
                None => others.push((key, value)),
            }
        }
        let mine = method.own_tensors(mine)?;
        others.extend(mine.into_iter().map(|(key, value)| (format!("{before}{key}"), value)));
        tensors = others;
    }
    Ok(tensors)
}

/// The tensors of the file by the names of parameters, in the form in which each method saves its own.
pub(crate) fn written(adapter: &Adapter, methods: &[Chosen]) -> Result<Named> {
    let of = |saved: bool| adapter.params().iter().filter(move |p| p.saved == saved);
    let named = |p: &NamedParam| (p.name.clone(), p.param.value());
    let mut tensors: Named = of(true).filter(|p| kept(methods, adapter, &p.name)).map(named).collect();
    for (number, (method, _)) in methods.iter().enumerate() {
        let before = prefix(methods, number);
        let own = |name: &str| name.strip_prefix(&before).map(str::to_owned);
        let state = of(false).map(named).filter_map(|(name, t)| Some((own(&name)?, t))).collect();
        let (mut mine, mut others) = (Named::new(), Named::new());
        for (name, value) in tensors {
            match own(&name) {
                Some(own) => mine.push((own, value)),
                None => others.push((name, value)),
            }
        }
        let mine = method.file_tensors(mine, &state)?;
        others.extend(mine.into_iter().map(|(name, value)| (format!("{before}{name}"), value)));
        tensors = others;
    }
    Ok(tensors)
}

/// The numbers in the type of the file, where tensors have that type.
pub(crate) fn as_stored(tensor: &Tensor, stored: Stored) -> Result<Tensor> {
    let whole =
        |tensor: &Tensor| -> Result<Vec<i64>> { Ok(tensor.to_vec()?.iter().map(|&v| v as i64).collect()) };
    Ok(match stored {
        _ if tensor.dtype() != DType::F32 => tensor.clone(),
        Stored::I64 => Tensor::from_i64(whole(tensor)?, tensor.shape())?,
        Stored::I32 => Tensor::from_i32(whole(tensor)?.iter().map(|&v| v as i32).collect(), tensor.shape())?,
        Stored::F32 | Stored::F16 | Stored::BF16 | Stored::U8 | Stored::I16 => tensor.clone(),
    })
}

/// Whole numbers of a file as the parameter has them, where the file holds them in another type.
pub(crate) fn as_held(tensor: Tensor, stored: Stored) -> Result<Tensor> {
    if tensor.dtype() == DType::F32 || matches!(stored, Stored::F32 | Stored::F16 | Stored::BF16) {
        return Ok(tensor);
    }
    let values = tensor.to_i64()?.iter().map(|&v| v as f32).collect();
    Ok(Tensor::from_vec(values, tensor.shape())?)
}
