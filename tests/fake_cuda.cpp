// A CUDA device that does nothing, for a torch without CUDA: enough for fake tensors, which have a
// device, a dtype and a shape, but no numbers. fake_cuda.py loads it before torch.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::Stream;

constexpr DeviceIndex count = 2;
static thread_local DeviceIndex current = 0;  // of this thread, as CUDA's is

static Device indexed(Device device) {
  return Device(c10::kCUDA, device.has_index() ? device.index() : current);
}

// What a `with torch.accelerator.device_index(1)` and a stream need.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  DeviceIndex deviceCount() const noexcept override { return count; }
  Device getDevice() const override { return Device(c10::kCUDA, current); }
  void setDevice(Device device) const override { current = indexed(device).index(); }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  Stream getStream(Device device) const override {
    return Stream(Stream::DEFAULT, indexed(device));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

// A generator of CUDA's is one of the CPU's that says it is on a GPU.
struct Renamed : c10::GeneratorImpl {
  using c10::GeneratorImpl::device_;
};

static at::Generator generator(DeviceIndex index) {
  at::Generator made = at::detail::createCPUGenerator();
  made.unsafeGetGeneratorImpl()->*(&Renamed::device_) =
      Device(c10::kCUDA, index < 0 ? current : index);
  return made;
}

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return count; }
  DeviceIndex deviceCount() const override { return count; }
  DeviceIndex getCurrentDevice() const override { return current; }
  at::Generator getNewGenerator(DeviceIndex index) const override { return generator(index); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static at::Generator generators[count] = {generator(0), generator(1)};
    return generators[index < 0 ? current : index];
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
};

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

static Guard guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::kCUDA, &guard);
