// Slots: which sequences of a pool a step works on. Of equal ones the last works on the pool itself, the others on copies
// that are thrown away: each sees the same old state, and one is stored.
struct Slots {
  std::vector<int64_t> at;
  std::vector<bool> copied;
  std::list<std::vector<char>> room;

  Slots(const Argument& slots, int64_t pool) {
    const bool wide = slots.type() == aoti_torch_dtype_int64();
    check(wide || slots.type() == aoti_torch_dtype_int32(), "slots", "must be int32 or int64");
    check(slots.dims() == 1, "slots", "must have one dim");
    const int64_t count = slots.sizes()[0], stride = slots.strides()[0];
    std::vector<int64_t> last(pool, -1);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t given = wide ? slots.data<int64_t>()[b * stride] : slots.data<int32_t>()[b * stride];
      const int64_t slot = given < 0 ? given + pool : given;
      if (slot < 0 || slot >= pool)
        fail("slot " + std::to_string(given) + " is out of range for a pool of " + std::to_string(pool));
      at.push_back(slot);
      last[slot] = b;
    }
    for (int64_t b = 0; b < count; ++b) copied.push_back(last[at[b]] != b);
  }
  // Where each sequence begins, in elements from `data`. stride: from slot to slot; span: elements that a slot reaches over.
  template <class T> std::vector<int64_t> begins(const T* data, int64_t stride, int64_t span) {
    std::vector<int64_t> out;
    for (size_t b = 0; b < at.size(); ++b) {
      out.push_back(at[b] * stride);
      if (!copied[b]) continue;
      room.emplace_back(std::max<int64_t>(span, 0) * sizeof(T));
      std::memcpy(room.back().data(), data + out[b], room.back().size());
      out[b] = (reinterpret_cast<intptr_t>(room.back().data()) - reinterpret_cast<intptr_t>(data)) / intptr_t(sizeof(T));
    }
    return out;
  }
};
