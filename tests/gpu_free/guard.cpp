// A CUDA device that does nothing, for torch's CPU wheel: enough that tensors may say that they are on "cuda:0" while they
// hold shapes only. pretend.py builds and loads it.
//
// torch asks two registries about a device: one holds the guard, which switches devices and streams, the other holds the
// hooks, which say what exists. Every answer is device 0, its default stream, and success. A third function chooses the
// kernel of scaled_dot_product_attention, which without it would be the plain products and a stored matrix of scores.
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::EventFlag, c10::Stream;
const Device device0(DeviceType::CUDA, 0);
const Stream stream0(Stream::DEFAULT, device0);

struct IdleGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return device0; }
  Device exchangeDevice(Device) const override { return device0; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream0; }
  Stream getNewStream(Device, int) const override { return stream0; }
  Stream exchangeStream(Stream) const override { return stream0; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

struct IdleHooks : at::CUDAHooksInterface {
  explicit IdleHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool hasCuBLASLt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, IdleGuard)

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, IdleHooks)
}

namespace at::native {

// What CUDA builds choose by default: FlashAttention for 16-bit numbers without a mask, else the memory-efficient kernel.
int64_t choose_attention(const Tensor& q, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double, bool,
                         std::optional<double>, bool) {
  bool flash = c10::isReducedFloatingType(q.scalar_type()) && !(mask && mask->defined()) && q.size(-1) <= 256;
  return static_cast<int64_t>(flash ? at::SDPBackend::flash_attention : at::SDPBackend::efficient_attention);
}

REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose_attention)

}  // namespace at::native
