defmodule Mix.Tasks.Vllm.EstimateTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  import VLLM.MixShell

  alias Mix.Tasks.Vllm.Estimate
  alias VLLM.{DemoModel, Quantization}

  @gib 1024 * 1024 * 1024

  setup :capture_shell

  defp device(fields \\ []) do
    Map.merge(
      %{
        name: "RTX 4090 24GB",
        kind: "cuda",
        memory: 24 * @gib,
        source: "",
        budget: 22 * @gib,
        weights: 15 * @gib,
        adapters: 0,
        draft: 0,
        activations: @gib,
        framework: @gib,
        kv_cache: 4 * @gib,
        left: @gib,
        fits?: true
      },
      Map.new(fields)
    )
  end

  defp estimate(fields \\ []) do
    struct!(
      %Quantization.Estimate{
        model: "org/m",
        method: nil,
        dtype: "bfloat16",
        fits?: true,
        max_model_len: 32_768,
        concurrency: 1,
        tensor_parallel_size: 1,
        pipeline_parallel_size: 1,
        data_parallel_size: 1,
        weights: %{
          disk: 15 * @gib,
          memory: 15 * @gib,
          peak: 15 * @gib,
          linear: 13 * @gib,
          embeddings: 2 * @gib,
          experts: 0,
          others: 0
        },
        kv_cache: %{
          dtype: "auto",
          bytes_per_token: 128 * 1024,
          bytes: 4 * @gib,
          available: 5 * @gib,
          tokens: 40_960,
          approximate?: false
        },
        devices: [device()],
        longest_context: 40_960,
        max_concurrency: 1,
        tokens_per_second: 62.5,
        remedies: [],
        formats: []
      },
      fields
    )
  end

  defp shown(estimate, flags \\ []) do
    assert Estimate.report(estimate, flags) == :ok
    printed()
  end

  test "prints what each device holds, and what fits" do
    assert shown(estimate()) == """
           org/m, plain

           device           memory  for vLLM   weights  activations  framework  KV cache     left
           RTX 4090 24GB  24.0 GiB  22.0 GiB  15.0 GiB      1.0 GiB    1.0 GiB   4.0 GiB  1.0 GiB

           Weights:  15.0 GiB in memory, 16.1 GB on the disk.
           KV cache: 128.0 KiB for each token, counted for one request of 32,768 tokens.
           Context:  40,960 tokens at most; one request of 32,768 fits at a time.
           Speed:    62.5 tokens/s of one request is the limit of the memory's bandwidth; expect less.

           It fits.
           """
  end

  test "prints what would make it fit, and what other formats take" do
    text =
      shown(
        estimate(
          fits?: false,
          devices: [device(left: -2 * @gib, fits?: false, draft: @gib)],
          remedies: [%{text: "A KV cache of 8 bits.", options: %{}, format: nil, devices: nil}],
          formats: [
            %{method: "gguf", name: "Q4_K_M", disk: 5 * @gib, memory: 5 * @gib, fits?: true}
          ],
          tokens_per_second: nil,
          max_concurrency: nil
        )
      )

    assert text =~ ~r/weights +draft +activations/
    assert text =~ "-2.0 GiB\n"

    assert text =~
             "It does not fit. Each of these alone would make it fit:\n  -> A KV cache of 8 bits."

    assert text =~ "gguf (Q4_K_M)  5.4 GB  5.0 GiB  yes\n"
    refute text =~ "Speed:"
    refute text =~ "at a time"
  end

  test "--json prints all of it" do
    text = shown(estimate(), ["json"])
    assert text =~ ~s("fits?": true)
    assert text =~ ~s("bytes_per_token": 131072)
  end

  test "answers about another machine" do
    assert Estimate.run([DemoModel.path(), "--devices", "24GiB,24GiB", "--max-model-len", "1024"]) ==
             :ok

    text = printed()
    assert length(Regex.scan(~r/^24GiB /m, text)) == 2
    assert text =~ "one request of 1,024 tokens"
    assert text =~ "It fits."
  end
end
