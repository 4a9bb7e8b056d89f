// What the gate of a feed-forward network goes through.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// What a gate goes through; the numbers are those of ops/swiglu.rs.
enum Activation { SILU, GELU_TANH };

// silu(g) = g sigmoid(g), or GELU by its tanh formula (Hendrycks & Gimpel, 2016), and its slope.
struct Gate {
    float value, slope;

    __device__ __forceinline__ Gate(float g, int activation) {
        if (activation == SILU) {
            float s = sigmoid(g);
            value = g * s;
            slope = s + value * (1.0f - s);
            return;
        }
        // sqrt(2 / pi)
        constexpr float A = 0.7978845608f, B = 0.044715f;
        float t = tanhf(A * (g + B * g * g * g));
        value = 0.5f * g * (1.0f + t);
        slope = 0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * (A * (1.0f + 3.0f * B * g * g));
    }
};
