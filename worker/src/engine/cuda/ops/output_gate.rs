//! [`crate::engine::ops::output_gate`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::engine::ops::output_gate::{gates_width, projected_width};
use crate::engine::ops::rope::HeadLayout;
use crate::launch;

/// Takes what was projected apart: into queries, keys and values, `[tokens][layout.width()]`, and the gates, `[tokens][heads * head_dim]`.
pub fn split<E: GpuElement>(
    gpu: &Gpu,
    projected: &CudaView<E>,
    layout: HeadLayout,
    (qkv, gates): (&mut CudaViewMut<E>, &mut CudaViewMut<E>),
) -> Result<(), GpuError> {
    let tokens = tokens_of(layout, qkv.len(), gates.len());
    assert_eq!(projected.len(), tokens * projected_width(layout), "rows");
    let name = format!("output_gate_split_{}", E::SUFFIX);
    let (count, [width, gated, size]) = (tokens as i64, sizes(layout));
    // SAFETY: all have a row for each token.
    unsafe {
        launch!(
            gpu,
            &name,
            Grid::scalars(projected.len()),
            [projected, qkv, gates, &count, &width, &gated, &size]
        )
    }
}

/// Puts together what [`split`] took apart.
pub fn join<E: GpuElement>(
    gpu: &Gpu,
    (qkv, gates): (&CudaView<E>, &CudaView<E>),
    layout: HeadLayout,
    (projected, rows): (&mut CudaViewMut<E>, Rows),
) -> Result<(), GpuError> {
    let tokens = tokens_of(layout, qkv.len(), gates.len());
    assert!(
        (rows.rows, rows.columns) == (tokens, projected_width(layout))
            && projected.len() >= rows.len(),
        "rows"
    );
    let name = format!("output_gate_join_{}", E::SUFFIX);
    let (count, [width, gated, size]) = (tokens as i64, sizes(layout));
    let stride = rows.stride as i64;
    // SAFETY: all have a row for each token.
    unsafe {
        launch!(
            gpu,
            &name,
            Grid::scalars(rows.rows * rows.columns),
            [
                qkv, gates, projected, &count, &width, &gated, &size, &stride
            ]
        )
    }
}

/// Computes rows of `y` of the context and the gates.
pub fn forward<E: GpuElement>(
    gpu: &Gpu,
    (context, gates): (&CudaView<E>, &CudaView<E>),
    (y, rows): (&mut CudaViewMut<E>, Rows),
) -> Result<(), GpuError> {
    let scalars = rows.rows * rows.columns;
    assert!(
        context.len() == scalars && gates.len() == scalars && y.len() >= rows.len(),
        "a gate for each scalar"
    );
    let name = format!("output_gate_forward_{}", E::SUFFIX);
    let (tokens, columns, stride) = (rows.rows as i64, rows.columns as i32, rows.stride as i64);
    // SAFETY: all were checked to hold their rows.
    unsafe {
        launch!(
            gpu,
            &name,
            Grid::scalars(scalars),
            [context, gates, y, &tokens, &columns, &stride]
        )
    }
}

/// Turns `dy`, the gradient of the result, into that of the context, and writes that of the gates; all have the same shape.
pub fn backward<E: GpuElement>(
    gpu: &Gpu,
    (context, gates): (&CudaView<E>, &CudaView<E>),
    dy: &mut CudaViewMut<E>,
    d_gates: &mut CudaViewMut<E>,
) -> Result<(), GpuError> {
    let scalars = context.len();
    assert!(
        [gates.len(), dy.len(), d_gates.len()] == [scalars; 3],
        "a gate for each scalar"
    );
    let name = format!("output_gate_backward_{}", E::SUFFIX);
    let count = scalars as i64;
    // SAFETY: all are as long as the kernel goes.
    unsafe {
        launch!(
            gpu,
            &name,
            Grid::scalars(scalars),
            [context, gates, dy, d_gates, &count]
        )
    }
}

fn tokens_of(layout: HeadLayout, qkv: usize, gates: usize) -> usize {
    let tokens = qkv / layout.width();
    assert!(
        qkv == tokens * layout.width() && gates == tokens * gates_width(layout),
        "a row for each token"
    );
    tokens
}

/// Columns of queries, keys and values, of the gates, and of a head.
fn sizes(layout: HeadLayout) -> [i32; 3] {
    [layout.width(), gates_width(layout), layout.head_dim].map(|size| size as i32)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::gpu::DeviceBuffer;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::output_gate as plain;
    use crate::engine::testing::random_values;

    const LAYOUT: HeadLayout = HeadLayout {
        heads: 4,
        key_value_heads: 2,
        head_dim: 6,
    };
    const TOKENS: usize = 70;

    #[test]
    fn what_is_taken_apart_and_put_together_is_that_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        let (width, gated) = (LAYOUT.width(), gates_width(LAYOUT));
        let projected = random_values(TOKENS * projected_width(LAYOUT), 1);
        let (mut qkv, mut gates) = (vec![0.0f32; TOKENS * width], vec![0.0f32; TOKENS * gated]);
        plain::split(&projected, LAYOUT, (&mut qkv, &mut gates));
        let on_gpu = gpu.upload(&projected).unwrap();
        let mut found = [qkv.len(), gates.len()].map(|len| gpu.take::<f32>(len).unwrap());
        let [to_qkv, to_gates] = &mut found;
        let to = (&mut to_qkv.as_view_mut(), &mut to_gates.as_view_mut());
        split(gpu, &on_gpu.as_view(), LAYOUT, to).unwrap();
        let read = |buffer: &DeviceBuffer<f32>| gpu.download(buffer, buffer.len()).unwrap();
        assert_eq!([read(&found[0]), read(&found[1])], [qkv, gates]);
        let rows = Rows::strided(TOKENS, width + gated, width + gated + 3);
        let mut joined = gpu.zeroed::<f32>(TOKENS * rows.stride).unwrap();
        let from = (&found[0].as_view(), &found[1].as_view());
        join(gpu, from, LAYOUT, (&mut joined.as_view_mut(), rows)).unwrap();
        let joined = read(&joined);
        let inner = joined.chunks(rows.stride).map(|row| &row[..rows.columns]);
        assert_eq!(inner.collect::<Vec<_>>().concat(), projected);
        let mut outer = joined.chunks(rows.stride).map(|row| &row[rows.columns..]);
        assert!(outer.all(|rest| rest == [0.0; 3]));
    }

    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        let gated = gates_width(LAYOUT);
        let [context, gates, dy] = [1, 2, 3].map(|seed| random_values(TOKENS * gated, seed));
        let mut y = vec![0.0f32; context.len()];
        plain::forward(&context, &gates, &mut y);
        let on_gpu = [&context, &gates].map(|values| gpu.upload(values).unwrap());
        let from = (&on_gpu[0].as_view(), &on_gpu[1].as_view());
        let rows = Rows::strided(TOKENS, gated, gated + 8);
        let mut found = gpu.zeroed::<f32>(TOKENS * rows.stride).unwrap();
        forward(gpu, from, (&mut found.as_view_mut(), rows)).unwrap();
        let found = gpu.download(&found, TOKENS * rows.stride).unwrap();
        let inner = found.chunks(rows.stride).map(|row| &row[..gated]);
        assert_near("y", &inner.collect::<Vec<_>>().concat(), &y, 1e-5);

        let (mut d, mut d_gates) = (dy.clone(), vec![0.0f32; dy.len()]);
        plain::backward(&context, &gates, &mut d, &mut d_gates);
        let mut found = [gpu.upload(&dy).unwrap(), gpu.take(dy.len()).unwrap()];
        let [to, to_gates] = &mut found;
        backward(
            gpu,
            from,
            &mut to.as_view_mut(),
            &mut to_gates.as_view_mut(),
        )
        .unwrap();
        let [found, found_gates] = found.map(|buffer| gpu.download(&buffer, dy.len()).unwrap());
        assert_near("d_context", &found, &d, 1e-5);
        assert_near("d_gates", &found_gates, &d_gates, 1e-5);
    }
}
