// Searches with an archive: first by its own reward, then by one that lives here, watched and with a deadline.
//   flowfast export --model scenes --reward scenes --method rbf --out scenes.pt
//   example scenes.pt "three red circles and one blue square" out.png
#include <flowfast/searcher.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <numeric>

namespace {

void save(const flowfast::Image& image, const std::string& path) {
  std::ofstream(path, std::ios::binary) << image.png();
}

// The share of red in each image: any function of images, prompts and linear times will do.
std::vector<float> redness(std::span<const flowfast::Image> images, std::span<const std::string>,
                           std::span<const float>) {
  std::vector<float> scores;
  for (const flowfast::Image& image : images) {
    const auto& pixels = image.pixels;  // planes: red, green, blue
    const size_t plane = pixels.size() / 3;
    const float red = std::accumulate(pixels.begin(), pixels.begin() + plane, 0.0f);
    scores.push_back(red / (std::accumulate(pixels.begin(), pixels.end(), 0.0f) + 1e-6f));
  }
  return scores;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) return std::fprintf(stderr, "usage: example ARCHIVE PROMPT PNG\n"), 2;
  const std::string archive = argv[1], prompt = argv[2], png = argv[3];

  flowfast::Searcher searcher(archive, {.threads = 1});
  const flowfast::Result best = searcher.submit({.prompt = prompt, .budget = 100, .seed = 0}).get();
  std::printf("reward %.4f after %lld NFE in %.2f s\n", best.reward(), static_cast<long long>(best.nfe), best.seconds);
  save(best.image(), png);

  flowfast::Searcher reddest(archive, {.threads = 1, .reward = redness});
  const flowfast::Handle handle = reddest.submit({.prompt = prompt, .budget = 100}, [](const flowfast::Progress& p) {
    std::printf("%lld of %lld NFE\n", static_cast<long long>(p.nfe), static_cast<long long>(p.budget));
  });
  if (!handle.wait_for(std::chrono::seconds(60))) handle.cancel();
  std::printf("redness %.4f\n", handle.get().reward());
  return 0;
} catch (const flowfast::Error& error) {
  std::fprintf(stderr, "example: %s\n", error.what());
  return 1;
}
