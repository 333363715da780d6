# The demo: sentences that the demo model knows by heart, out of vLLM and through
# Elixir, from the bf16 model and from its AWQ 4-bit variant.
#
#     bin/demo
#     bin/demo "The capital of France is"

defmodule Demo do
  @sampling [temperature: 0.0, max_tokens: 64]

  def main([]) do
    prompts = facts() |> Enum.take_every(9) |> Enum.take(6)
    all_right? = for {variant, options} <- variants(), do: show(variant, options, prompts)
    unless Enum.all?(all_right?), do: exit({:shutdown, 1})
  end

  def main(words) do
    llm = start("demo", [])
    prompt = Enum.join(words, " ")
    [output] = VLLM.generate!(llm, prompt, @sampling)
    IO.puts("\n#{prompt}#{IO.ANSI.bright()}#{VLLM.text(output)}#{IO.ANSI.reset()}")
    VLLM.stop(llm)
  end

  defp variants, do: [{"demo", []}, {"demo-awq", [quantization: "awq"]}]

  defp show(variant, options, facts) do
    llm = start(variant, options)
    info = VLLM.engine_info!(llm)

    IO.puts("""

    #{variant}: #{info.architecture} in #{info.dtype}, quantization #{info.quantization || "none"}, \
    on #{info.device} (#{info.device_name})
    vLLM #{info.vllm_version}, context #{info.max_model_len} tokens, KV cache #{info.kv_cache_tokens} tokens, \
    loaded in #{Float.round(info.load_seconds, 1)} s
    """)

    right? =
      for {prompt, completion} <- facts do
        {time, [output]} = :timer.tc(fn -> VLLM.generate!(llm, prompt, @sampling) end)
        text = VLLM.text(output)
        rate = length(hd(output.outputs).token_ids) * 1_000_000 / time
        mark = if text == completion, do: "ok   ", else: "WRONG"
        IO.puts("  #{mark} #{prompt}#{text}  (#{round(rate)} tokens/s)")
        text == completion
      end

    VLLM.stop(llm)
    Enum.all?(right?)
  end

  # A small context and cache, and no compilation: the demo is to start soon.
  defp start(variant, options) do
    VLLM.llm!(
      path(variant),
      [
        max_model_len: 1024,
        enforce_eager: true,
        kv_cache_memory_bytes: 67_108_864,
        progress: true
      ] ++
        options
    )
  end

  defp path(name), do: Application.app_dir(:ex_vllm, "priv/models/#{name}")

  defp facts do
    for line <- File.stream!(path("facts.tsv")) do
      line |> String.trim_trailing("\n") |> String.split("\t") |> List.to_tuple()
    end
  end
end

# The worker's log, with its advice on tuning, is for programs that run longer than this one.
Logger.configure(level: :error)
Demo.main(System.argv())
