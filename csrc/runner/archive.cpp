// Archives on libtorch. The methods and their meaning are those of flowfast/archive/module.py; this file calls them,
// and where model, decoder and reward are AOTInductor packages beside the archive, it calls these in their place.
#include "runner/archive.h"

#include <ATen/Parallel.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

#include <cfenv>
#include <cmath>
#include <filesystem>
#include <utility>

#include "runner/text.h"
#include "runner/seal.h"

namespace flowfast {
namespace {

using at::Tensor;
using c10::IValue;
using Named = std::map<std::string, Tensor>;
constexpr int kMostThreads = 4096;

std::vector<float> floats(const Tensor& tensor) {
  const Tensor flat = tensor.to(at::kCPU, at::kFloat).contiguous();
  return {flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel()};
}

std::vector<int64_t> integers(const Tensor& tensor) {
  const Tensor flat = tensor.to(at::kCPU, at::kLong).contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

Image image_of(const Tensor& image) {  // (C, H, W)
  if (image.dim() != 3)
    throw ModelError("expected images of shape (channels, height, width) from the decoder, got " +
                     std::to_string(image.dim()) + " dimensions");
  return {static_cast<int>(image.size(0)), static_cast<int>(image.size(1)), static_cast<int>(image.size(2)),
          floats(image)};
}

Named named(const IValue& value) {
  Named found;
  for (const auto& entry : value.toGenericDict()) found.emplace(entry.key().toStringRef(), entry.value().toTensor());
  return found;
}

std::string whole_message(const std::exception& error) {
  const auto* ours = dynamic_cast<const c10::Error*>(&error);
  return ours ? ours->what_without_backtrace() : error.what();
}

// What an error of PyTorch's says, in one line: a traceback of TorchScript says it last, every other text first.
std::string message_of(const std::exception& error) {
  const std::string said = whole_message(error);
  const bool traceback = said.find("Traceback of TorchScript") != std::string::npos;
  const std::string_view whole = trimmed(said);
  return std::string(trimmed(traceback ? whole.substr(whole.rfind('\n') + 1) : whole.substr(0, whole.find('\n'))));
}

// Throws what the archive raised: its message ends with a line "flowfast.errors.PromptError: text". Else E.
template <class E>
[[noreturn]] void throw_typed(const std::exception& error, const std::string& what_failed) {
  constexpr std::string_view kMark = "\nflowfast.errors.";
  const std::string said = whole_message(error);
  const size_t start = said.find(kMark), colon = said.find(": ", start);
  if (start == std::string::npos || colon == std::string::npos) throw E(what_failed + ": " + message_of(error));
  const std::string name = said.substr(start + kMark.size(), colon - start - kMark.size());
  const std::string text(trimmed(said.substr(colon + 2)));
  if (name == "PromptError") throw PromptError(text);
  if (name == "BudgetError") throw BudgetError(text);
  if (name == "OptionError") throw OptionError(text);
  if (name == "RewardError") throw RewardError(text);
  throw ModelError(text);
}

// An archive that holds its model, decoder and reward itself.
class Scripted : public Archive {
 public:
  Scripted(torch::jit::Module module, Info info, const Options& options)
      : module_(std::move(module)), device_(options.device), info_(std::move(info)), threads_(options.threads) {}

  const Info& info() const override { return info_; }

  void enter_thread() override {
    std::fesetenv(FE_DFL_ENV);  // rounding and denormals: a thread has those of the one that started it
    if (threads_ > 0) at::set_num_threads(threads_);
    // These two are the thread's own. TorchScript's optimiser costs the first search 0.3 s, gains nothing after it, and
    // what it fuses could round in another way than Python does.
    at::GradMode::set_enabled(false);
    torch::jit::setGraphExecutorOptimize(false);
  }

  void admit(int64_t slot, const Request& request, int64_t key) override {
    const IValue null = request.negative_prompt && info_.at("passes") == "2" ? encode(*request.negative_prompt)
                                                                             : IValue(c10::Dict<std::string, Tensor>());
    call("admit", slot, encode(request.prompt), null, key, request.budget, request.guidance.value(), request.until);
  }

  Result release(int64_t slot) override {
    Named found = named(call("release", slot));
    const std::vector<float> reward = floats(found.at("reward"));
    const std::vector<int64_t> transition = integers(found.at("transition")), cost = integers(found.at("cost"));
    Result result;
    result.nfe = cost.at(0), result.nfe_speculative = cost.at(1);
    result.reward_calls = cost.at(2), result.nan_rewards = cost.at(3);
    for (size_t k = 0; k < reward.size() && reward[k] != -INFINITY; ++k) {
      Sample sample{reward[k], image_of(released_image(found, k)), floats(found.at("x0")[k]), {}};
      if (!is_finite(sample.image)) {  // as it is decoded here; no reward can be trusted with it
        ++result.nan_rewards;
        continue;
      }
      const auto chain = integers(found.at("chain")[k]), candidate = integers(found.at("candidate")[k]);
      for (int64_t at = 0; at <= transition.at(k); ++at) sample.path.push_back({chain.at(at), at, candidate.at(at)});
      result.top.push_back(std::move(sample));
    }
    return result;
  }

  void propose() override { images_ = call("propose").toTensor(); }

  std::vector<Lane> lanes() override {
    const Named found = named(call("lanes"));
    live_ = found.at("live").nonzero().flatten();
    const auto of = [&](const char* name) { return found.at(name).index_select(0, live_); };
    const auto slot = integers(of("slot")), chain = integers(of("chain"));
    const auto transition = integers(of("transition")), candidate = integers(of("candidate"));
    const auto t = floats(of("t"));
    std::vector<Lane> lanes;
    for (size_t i = 0; i < slot.size(); ++i) lanes.push_back({slot[i], {chain[i], transition[i], candidate[i]}, t[i]});
    return lanes;
  }

  std::vector<Image> images() override {
    const Tensor host = images_.index_select(0, live_).to(at::kCPU);
    std::vector<Image> images;
    for (int64_t i = 0; i < host.size(0); ++i) images.push_back(image_of(host[i]));
    return images;
  }

  void score() override { rewards_ = call("score", images_).toTensor(); }

  void score(const std::vector<float>& rewards) override {
    rewards_ = at::full({images_.size(0)}, -INFINITY, at::TensorOptions().device(device_).dtype(at::kFloat));
    rewards_.index_copy_(0, live_, at::tensor(rewards).to(device_));
  }

  std::vector<float> rewards() override { return floats(rewards_.index_select(0, live_)); }
  void observe() override { call("observe", rewards_); }
  bool done(int64_t slot) override { return call("done", slot).toBool(); }
  int64_t nfe(int64_t slot) override { return call("spent").toTensor()[slot].item<int64_t>(); }

  Still still(int64_t slot) override {
    const auto found = call("still", slot).toTuple();
    return {found->elements().at(0).toInt(), found->elements().at(1).toInt()};
  }
  void limit(int64_t slot, int64_t nfe) override { call("limit", slot, nfe); }
  int64_t rounds_of(int64_t budget) override { return call("rounds_of", budget).toInt(); }
  int64_t budget_within(int64_t budget, int64_t rounds) override {
    return call("budget_within", budget, rounds).toInt();
  }

 protected:
  // The image (C, H, W) of the k-th sample that release found.
  virtual Tensor released_image(const Named& found, int64_t k) { return found.at("image")[k]; }

  template <class... Arguments>
  IValue call(const char* method, Arguments&&... arguments) {
    try {
      return module_.get_method(method)({IValue(std::forward<Arguments>(arguments))...});
    } catch (const std::exception& error) {
      throw_typed<ModelError>(error, std::string("the archive's ") + method + " failed");
    }
  }

  const at::Device device_;
  Tensor images_, rewards_;  // (N, 3, H, W) and (N,) of the round that is under way

 private:
  IValue encode(const std::string& prompt) { return call("encode", c10::List<std::string>({prompt})); }

  torch::jit::Module module_;
  const Info info_;
  const int threads_;
  Tensor live_;  // which lanes of the round are, by their index
};

// An archive whose model, decoder and reward are AOTInductor packages beside it.
class Compiled final : public Scripted {
 public:
  Compiled(const std::string& path, torch::jit::Module module, Info info, const Options& options)
      : Scripted(std::move(module), std::move(info), options),
        micro_batch_(std::stoll(this->info().at("micro_batch"))),
        velocity_(load(path, "velocity", options)),
        decode_(load(path, "decode", options)),
        reward_(this->info().at("host_reward") == "1" ? nullptr : load(path, "reward", options)) {}

  void propose() override {
    call("lay");
    call("branch");
    parts_.clear();
    for (int64_t i = 0, parts = call("null_parts").toInt(); i < parts; ++i)
      call("keep_null", i, velocity(named(call("null_inputs", i)), "null/"));
    for (int64_t i = 0, parts = call("parts").toInt(); i < parts; ++i) {
      const Named given = named(call("inputs", i));
      const Tensor u = velocity(given, "cond/");
      const auto null = given.lower_bound("null/");
      const bool guided = null != given.end() && null->first.starts_with("null/");
      call("mean", i, u, guided ? IValue(velocity(given, "null/")) : IValue());
    }
    for (int64_t i = 0, parts = call("scored_parts").toInt(); i < parts; ++i) {
      parts_.push_back(run(decode_, "decoder", {call("latents", i).toTensor()}));
      call("look", i, parts_.back());
    }
    images_ = parts_.empty() ? at::zeros({0, 3, 0, 0}, device_) : at::cat(parts_);
  }

  using Scripted::score;
  void score() override {
    std::vector<Tensor> rewards;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Named given = named(call("reward_inputs", static_cast<int64_t>(i)));
      rewards.push_back(run(reward_, "reward", with({parts_[i], given.at("t")}, given, "reward/")));
    }
    rewards_ = rewards.empty() ? at::zeros({0}, device_) : at::cat(rewards);
  }

 protected:
  Tensor released_image(const Named& found, int64_t k) override {  // a package takes micro-batches of one size
    const Tensor x0 = found.at("x0").narrow(0, k, 1);
    std::vector<int64_t> shape = x0.sizes().vec();
    shape[0] = micro_batch_;
    return run(decode_, "decoder", {x0.expand(shape).contiguous()})[0];
  }

 private:
  using Package = std::unique_ptr<torch::inductor::AOTIModelPackageLoader>;

  Package load(const std::string& path, const std::string& part, const Options& options) {
    const std::string file = (std::filesystem::path(path).parent_path() / info().at(part + "_file")).string();
    if (digest_of(file) != info().at(part + "_hash"))
      throw ArchiveError(file + " is damaged or of another export than " + path +
                         ": write both with `flowfast export`");
    return std::make_unique<torch::inductor::AOTIModelPackageLoader>(file, "model", false, 1,
                                                                     at::Device(options.device).index());
  }

  Tensor velocity(const Named& given, const std::string& conditions) {
    return run(velocity_, "velocity", with({given.at("x"), given.at("t")}, given, conditions));
  }

  static Tensor run(const Package& package, const std::string& name, const std::vector<Tensor>& inputs) {
    try {
      return package->run(inputs).at(0);
    } catch (const std::exception& error) {
      throw ModelError("the compiled " + name + " failed: " + message_of(error));
    }
  }

  // These tensors and the conditions with a prefix, by their names: the order in which packages take them.
  static std::vector<Tensor> with(std::vector<Tensor> tensors, const Named& given, const std::string& prefix) {
    for (auto entry = given.lower_bound(prefix); entry != given.end() && entry->first.starts_with(prefix); ++entry)
      tensors.push_back(entry->second);
    return tensors;
  }

  const int64_t micro_batch_;
  const Package velocity_, decode_, reward_;
  std::vector<Tensor> parts_;  // images, a micro-batch each
};

at::Device checked_device(const Options& options) {
  if (options.threads < 0 || options.threads > kMostThreads)
    throw OptionError("threads must be from 1 to " + std::to_string(kMostThreads) +
                      ", or 0 for PyTorch's own number, got " + std::to_string(options.threads));
  try {
    const at::Device device(options.device);
    if (device.is_cpu() || (device.is_cuda() && at::hasCUDA())) return device;
  } catch (const c10::Error&) {  // not a device's name
  }
  throw OptionError("device must be cpu, or cuda where PyTorch has it, got '" + options.device + "'");
}

// Throws unless the manifest has this entry, a number of at least so much.
template <class Number>
void check_number(const std::string& path, const Info& info, const std::string& name, Number least) {
  const auto found = info.find(name);
  const std::string text = found == info.end() ? "" : found->second;
  const std::optional<Number> number = number_in<Number>(text);
  if (!number || !(*number >= least))
    throw ArchiveError(path + " has no sound manifest: expected " + name + " of at least " + text_of(least) +
                       ", got '" + text + "'");
}

}  // namespace

std::unique_ptr<Archive> load_archive(const std::string& path, const Options& options) {
  const at::Device device = checked_device(options);
  const std::string digest = check_seal(path);
  const c10::InferenceMode no_inference(false);  // whatever the caller's: the driver thread writes to these tensors
  const at::NoGradGuard no_gradients;
  try {
    torch::jit::Module module = torch::jit::load(path, device);
    Info info;
    for (const auto& entry : module.get_method("info")({}).toGenericDict())
      info.emplace(entry.key().toStringRef(), entry.value().toStringRef());
    info["content_hash"] = digest;
    for (const char* name : {"slots", "micro_batch", "passes", "budget_min", "budget_max"})
      check_number<int64_t>(path, info, name, 1);
    check_number<int64_t>(path, info, "host_reward", 0);
    check_number<double>(path, info, "guidance", 0);
    if (info["host_reward"] == "1" && !options.reward)
      throw OptionError(path + " was exported with reward 'host': give one in Options::reward");
    if (info["loader"] == "aoti") return std::make_unique<Compiled>(path, std::move(module), info, options);
    return std::make_unique<Scripted>(std::move(module), info, options);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw ArchiveError("PyTorch cannot load " + path + ": " + message_of(error));
  }
}

}  // namespace flowfast
