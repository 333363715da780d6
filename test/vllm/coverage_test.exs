defmodule VLLM.CoverageTest do
  # All that the installed vLLM offers can be done from Elixir, or is listed here with the reason
  # why not. What a new vLLM adds, and what it takes away, fails until somebody has looked at it.
  use ExUnit.Case, async: true

  @parameters %{
    "SamplingParams" => VLLM.SamplingParams,
    "PoolingParams" => VLLM.PoolingParams,
    "StructuredOutputsParams" => VLLM.StructuredOutputsParams,
    "BeamSearchParams" => VLLM.BeamSearchParams
  }

  # Parameters that a caller does not set.
  @refused_parameters %{
    "SamplingParams" => %{
      "output_kind" => "a stream asks for deltas, any other call for the whole output",
      "skip_clone" => "each request has parameters of its own, so vLLM need not copy them",
      "output_text_buffer_length" => "vLLM derives it from `stop`",
      "flat_logprobs" => "a layout inside Python; in Elixir there is one"
    },
    "PoolingParams" => %{
      "task" =>
        "the function that is called: `embed`, `classify`, …, or `encode`'s `pooling_task`",
      "requires_token_ids" => "vLLM derives it from the task",
      "late_interaction_params" => "`score` and `rerank` make them",
      "output_kind" => "a pooled prompt has no deltas"
    },
    "StructuredOutputsParams" => %{},
    "BeamSearchParams" => %{
      "structured_outputs" => "the beam search of a serving engine does not look at it",
      "watermarking" => "vLLM marks no beams"
    }
  }

  @closures "runs a Python function in the workers: there is no Python to hand over from Elixir"
  @training "for training in Python that sends new weights to a running engine"
  @profiler "torch's profiler writes traces for developers of vLLM"
  @disaggregated "for prefill and decoding on different machines, behind a router of vLLM's"
  @operator "for vLLM's own server, whose operator resizes or repairs a cluster while it runs"
  @snapshot "for snapshots of processes by a container runtime"

  # How each method is reached: the functions that do the same, or why there is none. First those that
  # both classes have.
  @both %{
    "collective_rpc" => @closures,
    "encode" => [&VLLM.encode/3],
    "finish_weight_update" => @training,
    "from_engine_args" => [&VLLM.llm/2, &VLLM.child_spec/1],
    "get_tokenizer" => [&VLLM.tokenize/3, &VLLM.detokenize/3, &VLLM.apply_chat_template/3],
    "get_weight_version" => @training,
    "init_weight_transfer_engine" => @training,
    "release_kv_cache_memory" => @training,
    "reset_prefix_cache" => [&VLLM.reset_prefix_cache/2],
    "reset_mm_cache" => [&VLLM.reset_mm_cache/2],
    "shutdown_weight_transfer_engine" => @training,
    "sleep" => [&VLLM.sleep/2],
    "start_draft_weight_update" => @training,
    "start_profile" => @profiler,
    "start_weight_update" => @training,
    "stop_profile" => @profiler,
    "update_weight_version" => @training,
    "update_weights" => @training,
    "wake_up" => [&VLLM.wake_up/2]
  }

  @methods %{
    "LLM" =>
      Map.merge(@both, %{
        "apply_model" => @closures,
        "beam_search" => [&VLLM.beam_search/3],
        "chat" => [&VLLM.chat/3],
        "classify" => [&VLLM.classify/3],
        "embed" => [&VLLM.embed/3],
        "enqueue" => [&VLLM.stream_to/4],
        "enqueue_chat" => [&VLLM.chat_stream_to/4],
        "generate" => [&VLLM.generate/3],
        "get_default_sampling_params" =>
          "a parameter that is not given has the model's own default without being asked for",
        "get_metrics" => [&VLLM.metrics/2],
        "get_world_size" => [&VLLM.engine_info/2],
        "score" => [&VLLM.score/4, &VLLM.rerank/4],
        # The last message of each stream.
        "wait_for_completion" => [&VLLM.stream_to/4, &VLLM.chat_stream_to/4]
      }),
    "AsyncLLM" =>
      Map.merge(@both, %{
        "abort" => [&VLLM.cancel/1],
        "add_lora" => [&VLLM.load_lora/3],
        "add_request" => [&VLLM.generate/3, &VLLM.stream/3],
        "check_admission" => "`max_queue` limits what waits, before it reaches vLLM",
        "check_health" => [&VLLM.health/2],
        "checkpoint_prepare" => @snapshot,
        "checkpoint_restore" => @snapshot,
        "compute_weight_checksums" => @training,
        "dead_error" => [&VLLM.health/2],
        "do_log_stats" => [&VLLM.metrics/2],
        "errored" => [&VLLM.health/2],
        "from_vllm_config" => "a config is made of engine arguments, which can all be given",
        "generate" => [&VLLM.generate/3, &VLLM.stream/3],
        "get_kv_event_sources" => @disaggregated,
        "get_num_queued_tokens" => "counts for `check_admission`",
        "get_num_unfinished_requests" => [&VLLM.metrics/2],
        "get_status" => @operator,
        "get_supported_tasks" => [&VLLM.engine_info/2],
        "handle_fault" => @operator,
        "is_paused" => @training,
        "is_running" => [&VLLM.health/2],
        "is_sleeping" => "an engine sleeps from `sleep/2` to `wake_up/2`, which its owner calls",
        "is_stopped" => [&VLLM.health/2],
        "is_tracing_enabled" => "says back what the engine was started with",
        "list_loras" => [&VLLM.list_loras/2],
        "notify_kv_transfer_request_rejected" => @disaggregated,
        "pause_generation" => @training,
        "pin_lora" =>
          "adapters stay as long as `max_loras` and `max_cpu_loras` have room for them",
        "remove_lora" => [&VLLM.unload_lora/3],
        "reset_encoder_cache" => [&VLLM.reset_encoder_cache/2],
        "resume_generation" => @training,
        "scale_elastic_ep" => @operator,
        "shutdown" => [&VLLM.stop/1],
        "tokenizer" => [&VLLM.tokenize/3, &VLLM.detokenize/3],
        "wait_for_requests_to_drain" => "calls return when they are done, so who calls knows"
      })
  }

  # Written by python/tests/surface.py.
  @surface Path.expand("../support/surface.tsv", __DIR__)

  setup_all do
    surface =
      @surface
      |> File.read!()
      |> String.split("\n", trim: true)
      |> Enum.map(&String.split(&1, "\t"))
      |> Enum.group_by(&hd/1, &List.last/1)

    {:ok, surface: surface}
  end

  for {class, module} <- @parameters do
    test "all of #{class} can be given, or has a reason why not", %{surface: surface} do
      refused = Map.keys(@refused_parameters[unquote(class)])
      assert Enum.sort(names(unquote(module)) ++ refused) == Enum.sort(surface[unquote(class)])
    end
  end

  for class <- Map.keys(@methods) do
    test "all methods of #{class} have a function, or a reason why not", %{surface: surface} do
      assert Enum.sort(Map.keys(@methods[unquote(class)])) == Enum.sort(surface[unquote(class)])
    end
  end

  test "the functions that are named here exist" do
    Code.ensure_loaded!(VLLM)

    for {class, methods} <- @methods, {method, [_ | _] = functions} <- methods, f <- functions do
      info = Function.info(f)
      exists? = function_exported?(info[:module], info[:name], info[:arity])
      assert exists?, "#{class}.#{method} is said to be #{inspect(f)}, which does not exist"
    end
  end

  test "every class that is listed is looked at", %{surface: surface} do
    known = Map.keys(@parameters) ++ Map.keys(@methods)
    vllm_classes = Enum.reject(Map.keys(surface), &String.starts_with?(&1, "bridge "))
    assert Enum.sort(known) == Enum.sort(vllm_classes)
  end

  test "the bridge takes whatever parameter Elixir has", %{surface: surface} do
    for class <- ["SamplingParams", "PoolingParams", "BeamSearchParams"] do
      assert names(@parameters[class]) -- surface["bridge #{class}"] == []
    end
  end

  defp names(module) do
    for name <- Map.keys(struct!(module)), name != :__struct__, do: Atom.to_string(name)
  end
end
