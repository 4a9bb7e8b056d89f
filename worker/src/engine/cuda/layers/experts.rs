//! The feed-forward half of a decoder layer with experts: `x + Σ w_e · expert_e(norm(x))` over the few experts of each token, and
//! perhaps one that every token goes through.
//!
//! The rows of all experts are in memory at once, those of one after those of another, so that each operation but the products is
//! one launch.

use cudarc::driver::{CudaView, CudaViewMut};

use super::shared_expert::{SharedActivations, SharedExpert};
use super::{Pass, norm_backward, norm_forward, refresh_norm};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::ops::elementwise::add_in_place;
use crate::engine::cuda::ops::expert_gates::{self, Gradients, Saved};
use crate::engine::cuda::ops::expert_linear::ExpertLinear;
use crate::engine::cuda::ops::expert_rows;
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::cuda::ops::routing::{Routes, probability_sums};
use crate::engine::cuda::params::GradientSink;
use crate::engine::model::layers::expert::Gating;
use crate::engine::ops::router_loss::RouterLoss;
use crate::engine::ops::routing::Routing;

/// The feed-forward half of a decoder layer with experts.
pub struct Experts<E> {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    pub router: Projection<E>,
    pub routing: Routing,
    /// The gate and up projections of all experts, side by side or column by column as [`Gating`] has them.
    pub gate_up: ExpertLinear<E>,
    pub down: ExpertLinear<E>,
    pub shared: Option<SharedExpert<E>>,
    /// What is between an expert's layers.
    pub gating: Gating,
}

/// What the backward pass needs beside the input. The norm and what `down` reads are computed again.
pub struct ExpertActivations<E> {
    /// Of each expert for each token, `[tokens][experts]`.
    probabilities: DeviceBuffer<f32>,
    routes: Routes,
    /// Output of the gate and up projections, a row for each token in each of its experts, `[rows][2 * width]`.
    gate_up: DeviceBuffer<E>,
    shared: Option<SharedActivations<E>>,
}

/// Gradients on the way through the experts.
struct Through<E> {
    d_gate_up: DeviceBuffer<E>,
    /// Of the weight of each row.
    d_weights: DeviceBuffer<f32>,
}

impl<E: GpuElement> Experts<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        self.router.refresh(gpu, flat)?;
        self.gate_up.refresh(gpu, flat)?;
        self.down.refresh(gpu, flat)?;
        if let Some(shared) = &mut self.shared {
            shared.refresh(gpu, flat)?;
        }
        refresh_norm(&mut self.norm, gpu, flat)
    }

    /// Bytes that are kept for each token, but for the rows that fill up an expert's.
    pub fn kept_bytes(&self) -> usize {
        let shared = self.shared.as_ref().map_or(0, SharedExpert::kept_bytes);
        let Routing {
            experts, per_token, ..
        } = self.routing;
        let row = self.gate_up.out() * size_of::<E>() + 5 * size_of::<u32>();
        experts * size_of::<f32>() + per_token * row + shared
    }

    /// Width of the layer's result.
    pub fn hidden(&self) -> usize {
        self.down.out()
    }

    /// Runs forward up to the last activations that backward reads. `x` is `[tokens][hidden]`.
    pub fn forward_saving(
        &self,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<ExpertActivations<E>, GpuError> {
        let gpu = pass.gpu;
        let (probabilities, routes, gate_up) = {
            let read = norm_forward(&self.norm, x, &self.router, pass)?;
            let read = read.as_view();
            let mut probabilities = gpu.take::<f32>(pass.tokens() * self.routing.experts)?;
            let logits = &mut probabilities.as_view_mut();
            self.router.forward(&read, logits, pass.context())?;
            let routes = Routes::new(gpu, self.routing, logits)?;
            let gate_up = self.gate_up(&read, &routes, gpu)?;
            (probabilities, routes, gate_up)
        };
        let shared = self.shared.as_ref();
        let shared = shared.map(|shared| shared.forward_saving(&self.norm, x, pass));
        Ok(ExpertActivations {
            probabilities,
            routes,
            gate_up,
            shared: shared.transpose()?,
        })
    }

    fn gate_up(
        &self,
        read: &CudaView<E>,
        routes: &Routes,
        gpu: &Gpu,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let rows = self.gathered(read, routes, gpu)?;
        let mut gate_up = take_rows::<E>(gpu, routes, self.gate_up.out())?;
        let out = &mut gate_up.slice_mut(..routes.rows() * self.gate_up.out());
        let rows = rows.slice(..routes.rows() * self.hidden());
        self.gate_up.forward(gpu, &rows, out, routes)?;
        Ok(gate_up)
    }

    /// What experts read, of each row.
    fn gathered(
        &self,
        read: &CudaView<E>,
        routes: &Routes,
        gpu: &Gpu,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let mut rows = take_rows::<E>(gpu, routes, self.hidden())?;
        let out = &mut rows.slice_mut(..routes.rows() * self.hidden());
        expert_rows::gather(gpu, read, routes, out)?;
        Ok(rows)
    }

    /// Takes note of the layer for the router's loss. Waits for the GPU.
    pub fn add_to(
        &self,
        loss: &RouterLoss,
        activations: &ExpertActivations<E>,
        gpu: &Gpu,
    ) -> Result<(), GpuError> {
        let routes = &activations.routes;
        let probabilities = activations.probabilities.as_view();
        let sums = probability_sums(gpu, &probabilities, self.routing.experts)?;
        loss.add_sums(routes.batch_tokens(), &routes.counts(), &sums);
        Ok(())
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn forward_output(
        &self,
        x: &CudaView<f32>,
        activations: &ExpertActivations<E>,
        pass: Pass,
    ) -> Result<DeviceBuffer<f32>, GpuError> {
        let (gpu, routes) = (pass.gpu, &activations.routes);
        let results = self.results(activations, gpu)?;
        let mut y = gpu.take::<f32>(x.len())?;
        let out = &mut y.as_view_mut();
        let rows = results.slice(..routes.rows() * self.hidden());
        expert_rows::add_weighted(gpu, (x, &rows), routes, out)?;
        drop(results);
        if let (Some(shared), Some(activations)) = (&self.shared, &activations.shared) {
            shared.forward_onto(activations, out, pass)?;
        }
        Ok(y)
    }

    /// What experts give for each row, without its weight.
    fn results(
        &self,
        activations: &ExpertActivations<E>,
        gpu: &Gpu,
    ) -> Result<DeviceBuffer<f32>, GpuError> {
        let (routes, width) = (&activations.routes, self.down.input());
        let mut h = take_rows::<E>(gpu, routes, width)?;
        let gate_up = activations.gate_up.slice(..routes.rows() * 2 * width);
        let out = &mut h.slice_mut(..routes.rows() * width);
        expert_gates::forward(gpu, self.gating, &gate_up, out, width)?;
        let mut results = take_rows::<f32>(gpu, routes, self.hidden())?;
        let out = &mut results.slice_mut(..routes.rows() * self.hidden());
        let h = h.slice(..routes.rows() * width);
        self.down.forward(gpu, &h, out, routes)?;
        Ok(results)
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward(
        &self,
        x: &CudaView<f32>,
        activations: ExpertActivations<E>,
        gradient: &mut CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let ExpertActivations {
            probabilities,
            routes,
            gate_up,
            shared,
        } = activations;
        let through =
            self.backward_to_gate_up(gate_up, &gradient.as_view(), &routes, pass, sink)?;
        let Through {
            d_gate_up,
            d_weights,
        } = through;
        let mut d_normed = self.backward_to_read(x, d_gate_up, &routes, pass, sink)?;
        let d_read = &mut d_normed.as_view_mut();
        self.backward_router(x, (&probabilities, &routes, &d_weights), d_read, pass, sink)?;
        drop((probabilities, routes, d_weights));
        if let (Some(shared), Some(activations)) = (&self.shared, shared) {
            let read = (&self.norm, x);
            shared.backward(read, activations, (&gradient.as_view(), d_read), pass, sink)?;
        }
        norm_backward(&self.norm, (x, &d_normed.as_view()), gradient, pass, sink)
    }

    /// Goes backward through the experts' last layers, to their gates and ups and to the weight of each row.
    ///
    /// With `y = w · down(h)` the weight's gradient is `down(h) · dy`, which is `h · dh` where `dh` is that of `h` without the weight,
    /// and `bias · dy` besides where there is a bias.
    fn backward_to_gate_up(
        &self,
        gate_up: DeviceBuffer<E>,
        gradient: &CudaView<f32>,
        routes: &Routes,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<Through<E>, GpuError> {
        let (gpu, rows, width) = (pass.gpu, routes.rows(), self.down.input());
        let mut dy = take_rows::<E>(gpu, routes, self.hidden())?;
        let dy = &mut dy.slice_mut(..rows * self.hidden());
        expert_rows::gather_rounded(gpu, gradient, routes, dy)?;
        let mut dh = take_rows::<f32>(gpu, routes, width)?;
        let dh = &mut dh.slice_mut(..rows * width);
        self.down.backward_input(gpu, &dy.as_view(), dh, routes)?;
        let mut h = take_rows::<E>(gpu, routes, width)?;
        let mut d_gate_up = take_rows::<E>(gpu, routes, 2 * width)?;
        let mut d_weights = take_rows::<f32>(gpu, routes, 1)?;
        let saved = Saved {
            gate_up: &gate_up.slice(..rows * 2 * width),
            dh: &dh.as_view(),
            weights: &routes.weights(),
        };
        let gradients = Gradients {
            d_gate_up: &mut d_gate_up.slice_mut(..rows * 2 * width),
            h: &mut h.slice_mut(..rows * width),
            d_weights: &mut d_weights.slice_mut(..rows),
        };
        expert_gates::backward(gpu, self.gating, &saved, gradients)?;
        if let Some(biases) = self.down.biases() {
            let products = &mut d_weights.slice_mut(..rows);
            let biases = (&biases, &routes.experts());
            expert_rows::add_bias_products(gpu, &dy.as_view(), biases, products)?;
        }
        if self.down.learns() {
            expert_rows::scale(gpu, dy, &routes.weights())?;
            let factors = (&h.slice(..rows * width), &dy.as_view());
            self.down.backward_weights(gpu, factors, routes, sink)?;
        }
        Ok(Through {
            d_gate_up,
            d_weights,
        })
    }

    /// Goes backward through the experts' first layers, and returns the gradient of what they read, `[tokens][hidden]`.
    fn backward_to_read(
        &self,
        x: &CudaView<f32>,
        d_gate_up: DeviceBuffer<E>,
        routes: &Routes,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<DeviceBuffer<f32>, GpuError> {
        let (gpu, rows, hidden) = (pass.gpu, routes.rows(), self.hidden());
        let d_gate_up = d_gate_up.slice(..rows * self.gate_up.out());
        let mut d_read = take_rows::<f32>(gpu, routes, hidden)?;
        let out = &mut d_read.slice_mut(..rows * hidden);
        self.gate_up.backward_input(gpu, &d_gate_up, out, routes)?;
        let mut d_normed = gpu.take::<f32>(x.len())?;
        let out = &mut d_normed.as_view_mut();
        expert_rows::sum(gpu, &d_read.slice(..rows * hidden), routes, out)?;
        drop(d_read);
        if self.gate_up.learns() {
            let read = norm_forward(&self.norm, x, &self.router, pass)?;
            let gathered = self.gathered(&read.as_view(), routes, gpu)?;
            let factors = (&gathered.slice(..rows * hidden), &d_gate_up);
            self.gate_up.backward_weights(gpu, factors, routes, sink)?;
        }
        Ok(d_normed)
    }

    /// Goes backward through the router, and adds to the gradient of what it reads.
    fn backward_router(
        &self,
        x: &CudaView<f32>,
        (probabilities, routes, d_weights): (&DeviceBuffer<f32>, &Routes, &DeviceBuffer<f32>),
        d_read: &mut CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let (gpu, context) = (pass.gpu, pass.context());
        let rows = self.router.gradients(pass.tokens());
        let mut d_logits = gpu.take::<E>(rows.rows * rows.stride)?;
        let of_loss = pass.router_loss.map(RouterLoss::gradient);
        let of_loss = of_loss.map(|of_loss| gpu.upload(&of_loss)).transpose()?;
        let of_loss = of_loss.as_ref().map(DeviceBuffer::as_view);
        routes.backward(
            gpu,
            &probabilities.as_view(),
            &d_weights.slice(..routes.rows()),
            of_loss.as_ref(),
            &mut d_logits.as_view_mut(),
        )?;
        let d_logits = d_logits.as_view();
        let mut through = gpu.take::<f32>(d_read.len())?;
        let out = &mut through.as_view_mut();
        self.router.backward_input(&d_logits, out, context)?;
        add_in_place(gpu, d_read, &through.as_view())?;
        drop(through);
        if self.router.learns() {
            let read = norm_forward(&self.norm, x, &self.router, pass)?;
            let read = read.as_view();
            self.router
                .backward_weights(&read, &d_logits, context, sink)?;
        }
        Ok(())
    }
}

/// Takes memory for the most rows that such a batch has, so that how much a layer takes does not follow the tokens.
fn take_rows<T: GpuElement>(
    gpu: &Gpu,
    routes: &Routes,
    width: usize,
) -> Result<DeviceBuffer<T>, GpuError> {
    gpu.take(routes.most_rows() * width)
}
