// Gradients of weights in float32, of images in 16 bits: those of weights that were cast, as under autocast.
#pragma once

namespace dwconv {

// As long as one lives, what adds up partial sums on its thread may write gradients in float32 at once, with the values
// that they have in the images' dtype. Launchers need not know of it: Problem speaks of that dtype alone.
class Widening {
 public:
  Widening() : before_(current_) { current_ = this; }
  ~Widening() { current_ = before_; }
  Widening(const Widening&) = delete;
  Widening& operator=(const Widening&) = delete;

  // As long as one lives, gradients are written in the images' dtype all the same.
  class Pause {
   public:
    Pause() : paused_(current_) { current_ = nullptr; }
    ~Pause() { current_ = paused_; }
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    Widening* paused_;
  };

  // Whether gradients were written so.
  bool is_done() const { return is_done_; }

  // Whether to write gradients so; asked by the one that then does.
  static bool is_wanted() {
    if (current_ != nullptr) current_->is_done_ = true;
    return current_ != nullptr;
  }

 private:
  static inline thread_local Widening* current_ = nullptr;
  Widening* before_;
  bool is_done_ = false;
};

}  // namespace dwconv
