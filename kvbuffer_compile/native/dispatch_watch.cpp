// A dispatch key that tensors can be marked with, and a fallback that tells of every call with a marked tensor.
//
// The contract is in dispatch_watch.py. DeferredInit is meant for extensions outside of torch and has no user in it; it
// is asked before autocast, autograd, vmap and grad have wrapped or unwrapped anything. But nothing above Python is asked
// while a subclass with __torch_dispatch__ (DTensor) works on what is inside of it: for such calls there is a second key
// below, CustomRNGKeyId, which has no user either.
// The fallback reports by calling the op kvbuffer_watch::touched, whose kernel is written in Python: torch takes the
// lock of the interpreter, makes the arguments, and carries an exception back to the caller with its own type.

#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

constexpr auto KEY = DispatchKey::DeferredInit;
constexpr auto LOW = DispatchKey::CustomRNGKeyId;
constexpr auto NAME = "kvbuffer_compile";

std::atomic<bool> reporting{false};
thread_local std::vector<const c10::StorageImpl*> reported;  // by the calls that this thread is in

// The keys of a tensor can be changed by derived classes only.
struct Keys : c10::TensorImpl {
  static DispatchKeySet& of(c10::TensorImpl* tensor) { return tensor->*(&Keys::key_set_); }
};

const c10::StorageImpl* storage(const at::Tensor& tensor) {
  return tensor.has_storage() ? tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl() : nullptr;
}

bool marked(const at::Tensor& tensor) {
  // A wrapper of functionalisation takes the keys of what it wraps; that comes by itself when the call is unwrapped.
  // A nested tensor has no sizes to ask for; what it was made of was reported then.
  return tensor.defined() && tensor.key_set().has(KEY) && !tensor.key_set().has(DispatchKey::Functionalize) &&
         !tensor.is_nested();
}

template <typename Visit>
void each_tensor(c10::ArrayRef<c10::IValue> values, const Visit& visit) {
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      visit(value.toTensor());
    } else if (value.isTensorList() || value.isOptionalTensorList()) {
      for (const c10::IValue& element : value.toListRef()) {
        if (element.isTensor()) visit(element.toTensor());
      }
    }
  }
}

// Whether a storage is among reported[from], ..., reported[to - 1].
bool contains(size_t from, size_t to, const c10::StorageImpl* wanted) {
  const auto begin = reported.begin();
  return wanted != nullptr && std::find(begin + from, begin + to, wanted) != begin + to;
}

// While the callback runs, calls with marked tensors go through unseen.
void report(const c10::OperatorHandle& op, c10::List<at::Tensor> tensors) {
  static const auto touched = c10::Dispatcher::singleton().findSchemaOrThrow("kvbuffer_watch::touched", "");
  torch::jit::Stack stack{c10::toString(op.operator_name()), std::move(tensors)};
  c10::impl::ExcludeDispatchKeyGuard unseen(DispatchKeySet({KEY, LOW}));
  touched.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &stack);
}

// What a call reports is not reported again by the calls that it makes: their storages lie above its own.
struct Level {
  const size_t bottom = reported.size();
  ~Level() { reported.resize(bottom); }
};

template <DispatchKey AT>
void fallback(const c10::OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
  const Level level;
  std::optional<c10::List<at::Tensor>> fresh;
  each_tensor(torch::jit::last(*stack, op.schema().arguments().size()), [&](const at::Tensor& tensor) {
    if (!marked(tensor)) return;
    reported.push_back(storage(tensor));
    if (contains(0, level.bottom, reported.back())) return;
    if (!fresh) fresh.emplace();
    fresh->push_back(tensor);
  });
  const size_t top = reported.size();
  if (fresh && reporting) report(op, *std::move(fresh));

  op.redispatchBoxed(keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, AT), stack);

  // Most views take the keys of their base. Those that do not (set_, nested tensors) are marked here.
  each_tensor(torch::jit::last(*stack, op.schema().returns().size()), [&](const at::Tensor& tensor) {
    if (tensor.defined() && contains(level.bottom, top, storage(tensor))) {
      auto& result = Keys::of(tensor.unsafeGetTensorImpl());
      result = result.add(KEY).add(LOW);
    }
  });
}

// Kernels that serve every backend also serve LOW, ahead of its fallback, and some read memory themselves (clone,
// copy_): those ops get the fallback as a kernel of their own.
void listen() {
  auto& dispatcher = c10::Dispatcher::singleton();
  auto low = c10::KernelFunction::makeFromBoxedFunction<&fallback<LOW>>();
  // never taken back: the dispatcher may be gone before this library is
  auto keep = [](auto handle) { new auto(std::move(handle)); };
  keep(dispatcher.registerFallback(KEY, c10::KernelFunction::makeFromBoxedFunction<&fallback<KEY>>(), NAME));
  keep(dispatcher.registerFallback(LOW, low, NAME));
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (op && op->hasSchema() && op->hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd)) {
      keep(dispatcher.registerImpl(name, LOW, low, std::nullopt, nullptr, NAME));
    }
  }
}

}  // namespace

// Begin to report. False when the key has a fallback of someone else's.
extern "C" bool kvbuffer_watch_start() try {
  static bool registered = false;
  if (!registered) {
    listen();
    registered = true;
  }
  reporting = true;
  return true;
} catch (const std::exception&) {
  return false;
}

// What was reported by the calls that this thread is in is to be reported again.
extern "C" void kvbuffer_watch_again() { std::fill(reported.begin(), reported.end(), nullptr); }

extern "C" void kvbuffer_watch_stop() { reporting = false; }

extern "C" void kvbuffer_watch_mark(void* tensor, bool on) {
  auto& keys = Keys::of(static_cast<c10::TensorImpl*>(tensor));
  keys = on ? keys.add(KEY).add(LOW) : keys.remove(KEY).remove(LOW);
}
